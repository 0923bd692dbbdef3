"""Define the function shape that all allocators have."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from secateur.engine.scoring.base import Context


@dataclass(frozen=True)
class LayerLimit:
    """The most that can be removed from a layer: units of each structure, and the parameters of all together."""

    units: Mapping[str, int]
    parameters: int


@dataclass(frozen=True)
class Share:
    """What is removed from each layer.

    ``budgets`` are parameters, ``[layers]``; ``units`` has the numbers of units among them, ``[layers]``, of each
    structure for which the allocator decides that number too.
    """

    budgets: list[float]
    units: Mapping[str, list[int]] = field(default_factory=dict)


Allocator = Callable[[Context, Sequence[LayerLimit], float], Share]
"""Function ``(context, limits, total) -> share``, which spreads ``total`` parameters over layers within ``limits``."""


def layer_parameters(context: Context) -> list[float]:
    """Return the number of prunable parameters of each layer at its present widths."""
    decoder = context.decoder
    return [float(decoder.shape.layer_parameters(at, layer.shape)) for at, layer in enumerate(decoder.layers)]


def fill(weights: Sequence[float], limits: Sequence[float], total: float) -> list[float]:
    """Return budgets in proportion to ``weights``, none above its limit, that add up to ``total``.

    ``total`` is at most the sum of the limits. The budgets solve Σ_l min(c·w_l, limit_l) = total exactly: a layer whose
    limit binds gets its limit, and the other layers share what is left. A layer with weight zero gets nothing unless
    the limits of the other layers add up to less than ``total``.
    """
    budgets = [0.0] * len(weights)
    reach = sum(limit for weight, limit in zip(weights, limits, strict=True) if weight > 0)
    if reach < total:
        idle = [0.0 if weight > 0 else limit for weight, limit in zip(weights, limits, strict=True)]
        rest = fill(idle, idle, total - reach)
        return [limit if weight > 0 else more for weight, limit, more in zip(weights, limits, rest, strict=True)]
    open_layers = {index for index, weight in enumerate(weights) if weight > 0}
    while open_layers:
        left = total - sum(budgets)
        scale = left / sum(weights[index] for index in open_layers)
        full = {index for index in open_layers if scale * weights[index] >= limits[index]}
        for index in full or open_layers:
            budgets[index] = limits[index] if full else scale * weights[index]
        if not full:
            break
        open_layers -= full
    return budgets
