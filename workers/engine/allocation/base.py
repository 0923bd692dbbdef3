"""The one function shape of all allocators."""

from collections.abc import Callable, Sequence

from workers.engine.scoring.base import Context

Allocator = Callable[[Context, Sequence[int], float], list[float]]
"""``(context, removable, total) -> budgets``: parameters to remove by layer, adding up to ``total``.

``removable`` is the most that each layer can give. ``total`` is at most their sum.
"""


def fill(weights: Sequence[float], limits: Sequence[float], total: float) -> list[float]:
    """Budgets in proportion to ``weights``, none above its limit, that add up to ``total`` (at most the limits' sum).

    Solves Σ_l min(c·w_l, limit_l) = total exactly: limits that bind are set, the rest share what is left.
    """
    budgets = [0.0] * len(weights)
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
