"""FLAP's fluctuation metric (An et al., section 3.2)."""

import torch
from torch import Tensor

from workers.engine.decoder import PARTS, Layer, Part
from workers.engine.scoring.base import Context, Scores


def score(context: Context) -> Scores:
    """S_j = Var(x_j)·‖W_:,j‖² of the output projections, standardised in every layer and part (equations 4, 5 and 7).

    As the authors' code has it, heads' metric is squared before it is standardised, and a head scores the mean over its
    inputs. Of the unpruned model alone: nothing is cut before all is scored.
    """
    scores: dict[Part, list[Tensor]] = {
        part: [
            _standardised(layer, part, variance)
            for layer, variance in zip(context.decoder.layers, context.survey.variances[part], strict=True)
        ]
        for part in PARTS
    }
    return Scores(**scores)


def _standardised(layer: Layer, part: Part, variance: Tensor) -> Tensor:
    metric = variance * layer.output(part).weight.double().square().sum(0).cpu()
    if part == "heads":
        metric = metric.square()
    standard = (metric - metric.mean()) / metric.std().clamp_min(torch.finfo(torch.float64).tiny)
    return standard.view(-1, layer.width(part)).mean(1)
