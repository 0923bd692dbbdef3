"""Score units by FLAP's fluctuation metric (An et al., section 3.2)."""

import torch
from torch import Tensor

from secateur.engine.model.decoder import Layer
from secateur.engine.scoring.base import Context, Scores
from secateur.engine.structures import WIDTHS, Width


def score(context: Context) -> Scores:
    """Return S_j = Var(x_j)·‖W_:,j‖² of the output projections, standardised in every layer and structure.

    The metric is that of equations 4, 5 and 7. As in the authors' code, the metric of attention inputs is squared
    before it is standardised, and the score of a KV group is the mean over its inputs. The scores depend on the
    unpruned model alone: all units are scored before any unit is cut.
    """
    layers, variances = context.decoder.layers, context.forward_statistics.variances
    return {
        name: [_standardised(layer, structure, own) for layer, own in zip(layers, variances[name], strict=True)]
        for name, structure in WIDTHS.items()
    }


def _standardised(layer: Layer, structure: Width, variance: Tensor) -> Tensor:
    if not structure.units(layer):
        return variance[:0]
    metric = variance * structure.output(layer).weight.double().square().sum(0).cpu()
    if structure.part == "attention":
        metric = metric.square()
    standard = (metric - metric.mean()) / metric.std().clamp_min(torch.finfo(torch.float64).tiny)
    return standard.view(-1, structure.width(layer)).mean(1)
