"""Allocate the same ratio to every layer, or to every layer except the outer ones."""

from collections.abc import Sequence

from secateur.engine.allocation.base import LayerLimit, Share, fill, layer_parameters
from secateur.engine.scoring.base import Context


def allocate(context: Context, limits: Sequence[LayerLimit], total: float) -> Share:
    """Return shares in proportion to the parameters of each layer."""
    return Share(fill(layer_parameters(context), [limit.parameters for limit in limits], total))


def allocate_inner(context: Context, limits: Sequence[LayerLimit], total: float) -> Share:
    """Return shares in proportion to the parameters of each inner layer.

    Nothing is removed from the first eighth and the last sixteenth of the layers unless the other layers have too few
    parameters to remove. LLM-Pruner's authors prune layers 4 to 29 of 32.
    """
    weights = layer_parameters(context)
    first, last = round(len(weights) / 8), round(len(weights) / 16)
    inner = [weight if first <= index < len(weights) - last else 0.0 for index, weight in enumerate(weights)]
    return Share(fill(inner, [limit.parameters for limit in limits], total))
