"""Convert a budget of parameters for each layer into whole units; rounding changes a budget by at most one block.

Every allocator uses this module: the allocator decides how many parameters are removed from each layer, and this module
converts them into KV groups and blocks of channels so that the whole model meets the goal to within half a block.
"""

import heapq
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from secateur.catalog.architectures import LayerShape, ModelShape, channel_steps
from secateur.catalog.structures import WIDTHS
from secateur.engine.allocation.base import LayerLimit, Share
from secateur.engine.scoring.base import Scores

UnitCounts = dict[str, int]
"""Number of whole units that are removed from a layer, by structure; channels that all experts lose count as one."""


@dataclass(frozen=True)
class Layers:
    """The layers of a model as they are now: their sizes, and the units that pruning may still remove from them."""

    shape: ModelShape
    """The sizes of the source, which has the prices."""
    now: Sequence[LayerShape]
    width_multiple: int

    def __len__(self) -> int:
        return len(self.now)

    def units(self, structure: str) -> list[int]:
        """Return the number of units of each layer."""
        return [self.shape.units(structure, index, layer) for index, layer in enumerate(self.now)]

    def prices(self, structure: str) -> list[int]:
        """Return the parameters of one unit of each layer."""
        return [self.shape.price(structure, index, layer) for index, layer in enumerate(self.now)]

    def sizes(self) -> list[int]:
        """Return the parameters of all units of each layer that may be cut, without the biases that stay."""
        widths = self.shape.widths
        by_structure = [zip(self.units(name), self.prices(name), strict=True) for name in widths]
        return [sum(count * price for count, price in layer) for layer in zip(*by_structure, strict=True)]

    def removable(self, structure: str) -> list[int]:
        """Return how many units each layer can lose."""
        multiple = self.width_multiple
        return [self.shape.removable(structure, index, multiple, layer) for index, layer in enumerate(self.now)]

    @property
    def limits(self) -> list[LayerLimit]:
        """The most that each layer can lose."""
        most = {name: self.removable(name) for name in WIDTHS}
        prices = {name: self.prices(name) for name in WIDTHS}
        return [
            LayerLimit(
                {name: most[name][index] for name in WIDTHS},
                sum(most[name][index] * prices[name][index] for name in WIDTHS),
            )
            for index in range(len(self))
        ]


def whole_units(layers: Layers, share: Share, kv_groups: float, scores: Scores | None) -> list[UnitCounts]:
    """Convert each layer's share into KV groups and channels, ``M(l) = {u : S(u) < quantile_τ(l)}``.

    The paper prints Quantile_{1−τ} and uses one letter for threshold and ratio; the reading that makes sense is that
    the *lowest* τ(l) of a layer is removed. ``kv_groups`` is the number of parameters that all layers together lose
    with KV groups where ``share`` leaves that open. Channels make up the rest of the budgets; the sum of the budgets is
    met to within half a block of channels as long as the layers have enough channels to remove.
    """
    groups = share.units.get("kv_groups") or _spread_groups(layers, scores, share.budgets, kv_groups)
    spent = [count * price for count, price in zip(groups, layers.prices("kv_groups"), strict=True)]
    left = [budget - gone for budget, gone in zip(share.budgets, spent, strict=True)]
    removed = _spread_channels(layers, left)
    return [{"kv_groups": count, "channels": channels} for count, channels in zip(groups, removed, strict=True)]


def equal_units(layers: Layers, total: float, kv_groups: float) -> list[UnitCounts]:
    """Return unit counts that leave every layer with the same numbers of units.

    Layers lose together the number of KV groups that comes nearest to ``kv_groups`` parameters, and the whole steps of
    channels that come nearest to what is left of ``total`` parameters.
    """
    counts, left = [], total
    choices = dict(zip(WIDTHS, layers.shape.common_units(layers.width_multiple, layers.now), strict=True))
    for structure in WIDTHS:
        prices, units = layers.prices(structure), layers.units(structure)
        wanted = kv_groups if structure == "kv_groups" else left

        def gone(kept: int, prices: list[int] = prices, units: list[int] = units) -> int:
            return sum(max(count - kept, 0) * price for count, price in zip(units, prices, strict=True))

        kept = min(choices[structure], key=lambda kept: abs(gone(kept) - wanted))
        counts.append([max(count - kept, 0) for count in units])
        left -= gone(kept)
    return [dict(zip(WIDTHS, of_layer, strict=True)) for of_layer in zip(*counts, strict=True)]


def best(scores: Tensor, removed: int) -> tuple[int, ...]:
    """Return the indices of all units except the ``removed`` lowest-scored ones, in ascending order."""
    return tuple(sorted(torch.argsort(scores, stable=True)[removed:].tolist()))


def _spread_groups(layers: Layers, scores: Scores | None, budgets: Sequence[float], parameters: float) -> list[int]:
    """Spread KV groups to remove, of ``parameters`` parameters together, over the layers.

    Each layer loses its share of its budget, rounded down or up. A layer has few groups, so most of its share is a
    fraction. Where scores are known, and so comparable across layers (by α(l)), the score of the group that would be
    removed decides which layers round up; otherwise the largest fraction decides.
    """
    ascending = None if scores is None else [values.sort().values.tolist() for values in scores["kv_groups"]]
    prices, most, units = layers.prices("kv_groups"), layers.removable("kv_groups"), layers.units("kv_groups")
    shares = [count * budget / (size or 1) for count, budget, size in zip(units, budgets, layers.sizes(), strict=True)]
    removed = [0] * len(layers)

    def claim(index: int) -> tuple[int, float, int]:
        missing = shares[index] - removed[index]
        urgency = 0 if missing >= 1 else 1 if missing > 1e-6 else 2
        return (urgency, -missing if ascending is None else ascending[index][removed[index]], index)

    heap = [claim(index) for index, count in enumerate(most) if count]
    heapq.heapify(heap)
    while heap and parameters > 0:
        _, _, index = heapq.heappop(heap)
        if prices[index] >= 2 * parameters:  # without it, less is missed
            continue
        removed[index] += 1
        parameters -= prices[index]
        if removed[index] < most[index]:
            heapq.heappush(heap, claim(index))
    return removed


def _spread_channels(layers: Layers, budgets: list[float]) -> list[int]:
    """Spread the channels to remove over the layers, in whole steps.

    Each step is removed from the layer that is furthest behind its budget.
    """
    most = zip(layers.units("channels"), layers.removable("channels"), strict=True)
    steps = [channel_steps(units, layers.width_multiple) if some else [] for units, some in most]
    prices = layers.prices("channels")
    removed = [0] * len(steps)
    taken = [0] * len(steps)
    heap = [(-budget, index) for index, budget in enumerate(budgets) if steps[index]]
    heapq.heapify(heap)
    missing = sum(budgets)
    while heap:
        _, index = heapq.heappop(heap)
        step = steps[index][taken[index]] * prices[index]
        if abs(missing - step) >= abs(missing):
            break
        missing -= step
        removed[index] += steps[index][taken[index]]
        taken[index] += 1
        if taken[index] < len(steps[index]):
            heapq.heappush(heap, (removed[index] * prices[index] - budgets[index], index))
    return removed
