"""The one function shape of all allocators."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from secateur.engine.scoring.base import Context


@dataclass(frozen=True)
class LayerLimit:
    """The most that a layer can give, in units and, together, in parameters."""

    kv_groups: int
    channels: int
    parameters: int


@dataclass(frozen=True)
class Share:
    """What each layer gives: parameters, ``[layers]``, and how many KV groups are among them where that is decided too."""

    budgets: list[float]
    kv_groups: list[int] | None = None


Allocator = Callable[[Context, Sequence[LayerLimit], float], Share]
"""``(context, limits, total) -> share``: ``total`` parameters, spread over layers that can give so much each."""


def layer_parameters(context: Context) -> list[float]:
    """Prunable parameters of each layer, as it is now."""
    decoder = context.decoder
    return [float(decoder.shape.layer_parameters(layer.shape)) for layer in decoder.layers]


def fill(weights: Sequence[float], limits: Sequence[float], total: float) -> list[float]:
    """Budgets in proportion to ``weights``, none above its limit, that add up to ``total`` (at most the limits' sum).

    Solves Σ_l min(c·w_l, limit_l) = total exactly: limits that bind are set, the rest share what is left. Layers without
    weight give nothing, unless the others cannot give enough.
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
