"""The same ratio in every layer."""

from collections.abc import Sequence

from workers.engine.allocation.base import fill
from workers.engine.scoring.base import Context


def allocate(context: Context, removable: Sequence[int], total: float) -> list[float]:
    """Each layer gives in proportion to the parameters it has."""
    decoder = context.decoder
    return fill([decoder.shape.layer_parameters(layer.shape) for layer in decoder.layers], removable, total)
