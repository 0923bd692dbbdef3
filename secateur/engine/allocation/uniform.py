"""The same ratio in every layer, or in all but the outer ones."""

from collections.abc import Sequence

from secateur.engine.allocation.base import LayerLimit, Share, fill, layer_parameters
from secateur.engine.scoring.base import Context


def allocate(context: Context, limits: Sequence[LayerLimit], total: float) -> Share:
    """Each layer gives in proportion to the parameters it has."""
    return Share(fill(layer_parameters(context), [limit.parameters for limit in limits], total))


def allocate_inner(context: Context, limits: Sequence[LayerLimit], total: float) -> Share:
    """The same, but the first eighth of the layers and the last sixteenth give nothing unless the others cannot do alone.

    LLM-Pruner's authors prune layers 4 to 29 of 32.
    """
    weights = layer_parameters(context)
    first, last = round(len(weights) / 8), round(len(weights) / 16)
    inner = [weight if first <= index < len(weights) - last else 0.0 for index, weight in enumerate(weights)]
    return Share(fill(inner, [limit.parameters for limit in limits], total))
