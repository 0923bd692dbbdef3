"""Score units by FLAP's fluctuation metric (An et al., section 3.2)."""

import torch
from torch import Tensor

from secateur.engine.model.decoder import STRUCTURES, Layer, Structure
from secateur.engine.scoring.base import Context, Scores


def score(context: Context) -> Scores:
    """Return S_j = Var(x_j)·‖W_:,j‖² of the output projections, standardised in every layer and structure.

    The metric is that of equations 4, 5 and 7. As in the authors' code, the metric of attention inputs is squared
    before it is standardised, and the score of a KV group is the mean over its inputs. The scores depend on the
    unpruned model alone: all units are scored before any unit is cut.
    """
    scores: dict[Structure, list[Tensor]] = {
        structure: [
            _standardised(layer, structure, variance)
            for layer, variance in zip(
                context.decoder.layers, context.forward_statistics.variances[structure], strict=True
            )
        ]
        for structure in STRUCTURES
    }
    return Scores(**scores)


def _standardised(layer: Layer, structure: Structure, variance: Tensor) -> Tensor:
    metric = variance * layer.output(structure).weight.double().square().sum(0).cpu()
    if structure == "kv_groups":
        metric = metric.square()
    standard = (metric - metric.mean()) / metric.std().clamp_min(torch.finfo(torch.float64).tiny)
    return standard.view(-1, layer.width(structure)).mean(1)
