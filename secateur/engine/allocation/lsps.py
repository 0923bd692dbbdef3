"""Allocate by LSPS, the Layer-aware Sensitivity Pruning Strategy (Wang, section 3.3)."""

from collections.abc import Sequence

import torch

from secateur.engine.allocation.base import LayerLimit, Share, fill, layer_parameters
from secateur.engine.scoring.base import Context

STEEPNESS = 0.9
"""How far τ(l) falls from an insensitive layer to the most sensitive one.

The value is below 1, so that something is removed from every layer.
"""


def sensitivity(context: Context) -> list[float]:
    """Return α(l), the mean of |∂L/∂u| over the layer's units, scaled into (0, 1] by the largest mean of all layers."""
    gradients = [torch.cat([gate.gradient for gate in layer.values()]).abs() for layer in context.gates]
    means = [float(own.sum()) / max(len(own), 1) for own in gradients]
    largest = max(means) or 1.0
    return [mean / largest for mean in means]


def allocate(context: Context, limits: Sequence[LayerLimit], total: float) -> Share:
    """Return τ(l) = min(c·(1 − β·α(l)), the layer's limit), with c solved so that the whole meets the goal exactly.

    The paper says that τ(l) falls as α(l) rises and that the whole must meet τ, but not by which function. A straight
    line has one parameter, β (:data:`STEEPNESS`).
    """
    sizes, sensitivities = layer_parameters(context), sensitivity(context)
    context.details["sensitivity"] = sensitivities
    weights = [(1 - STEEPNESS * alpha) * size for alpha, size in zip(sensitivities, sizes, strict=True)]
    return Share(fill(weights, [limit.parameters for limit in limits], total))
