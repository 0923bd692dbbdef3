"""Convert a budget of parameters for each layer into whole units; rounding changes a budget by at most one block.

Every allocator uses this module: the allocator decides how many parameters are removed from each layer, and this module
converts them into KV groups and blocks of channels so that the whole model meets the goal to within half a block.
"""

import heapq
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from secateur.catalog.architectures import LayerShape, UnitCost, channel_steps
from secateur.engine.allocation.base import Share
from secateur.engine.model.decoder import Structure
from secateur.engine.scoring.base import Scores


@dataclass(frozen=True)
class UnitCounts:
    """Number of whole units that are removed from a layer."""

    kv_groups: int
    channels: int

    def removed(self, structure: Structure) -> int:
        return self.kv_groups if structure == "kv_groups" else self.channels


def whole_units(
    shapes: Sequence[LayerShape],
    share: Share,
    kv_groups: int,
    scores: Scores | None,
    cost: UnitCost,
    width_multiple: int,
) -> list[UnitCounts]:
    """Convert each layer's share into KV groups and channels, ``M(l) = {u : S(u) < quantile_τ(l)}``.

    The paper prints Quantile_{1−τ} and uses one letter for threshold and ratio; the reading that makes sense is that
    the *lowest* τ(l) of a layer is removed. ``kv_groups`` is the number of groups that all layers together lose where
    ``share`` leaves that number open. Channels make up the rest of the budgets; the sum of the budgets is met to within
    half a block of ``width_multiple`` channels as long as the layers have enough channels to remove.
    """
    groups = share.kv_groups or _spread_groups(shapes, scores, share.budgets, kv_groups, cost)
    left = [budget - count * cost.kv_group for budget, count in zip(share.budgets, groups, strict=True)]
    steps = [channel_steps(shape.channels_per_expert, width_multiple) for shape in shapes]
    removed = _spread_channels(steps, left, cost.channel)
    return [UnitCounts(count, channels) for count, channels in zip(groups, removed, strict=True)]


def equal_units(
    shapes: Sequence[LayerShape], total: float, kv_groups: int, cost: UnitCost, width_multiple: int
) -> list[UnitCounts]:
    """Return the same unit counts for every layer of a model whose layers are all alike.

    Each layer loses an equal share of ``kv_groups``, and the whole steps of channels that come nearest to what is left
    of ``total`` parameters.
    """
    groups = kv_groups // len(shapes)
    left = total / len(shapes) - groups * cost.kv_group
    choices = accumulate(channel_steps(shapes[0].channels_per_expert, width_multiple), initial=0)
    channels = min(choices, key=lambda count: abs(count * cost.channel - left))
    return [UnitCounts(groups, channels)] * len(shapes)


def best(scores: Tensor, removed: int) -> tuple[int, ...]:
    """Return the indices of all units except the ``removed`` lowest-scored ones, in ascending order."""
    return tuple(sorted(torch.argsort(scores, stable=True)[removed:].tolist()))


def _spread_groups(
    shapes: Sequence[LayerShape], scores: Scores | None, budgets: Sequence[float], count: int, cost: UnitCost
) -> list[int]:
    """Spread ``count`` KV groups to remove over the layers: each layer's share of its budget, rounded down or up.

    A layer has few groups, so most of its share is a fraction. Where scores are known, and so comparable across layers
    (by α(l)), the score of the group that would be removed decides which layers round up; otherwise the largest
    fraction decides.
    """
    ascending = None if scores is None else [values.sort().values.tolist() for values in scores.kv_groups]
    shares = [
        shape.kv_groups * budget / _parameters(shape, cost) for shape, budget in zip(shapes, budgets, strict=True)
    ]
    removed = [0] * len(shapes)

    def claim(index: int) -> tuple[int, float, int]:
        missing = shares[index] - removed[index]
        urgency = 0 if missing >= 1 else 1 if missing > 1e-6 else 2
        return (urgency, -missing if ascending is None else ascending[index][removed[index]], index)

    heap = [claim(index) for index, shape in enumerate(shapes) if shape.kv_groups > 1]
    heapq.heapify(heap)
    for _ in range(count):
        _, _, index = heapq.heappop(heap)
        removed[index] += 1
        if removed[index] < shapes[index].kv_groups - 1:
            heapq.heappush(heap, claim(index))
    return removed


def _spread_channels(steps: list[list[int]], budgets: list[float], per_channel: int) -> list[int]:
    """Spread the channels to remove over the layers, in whole steps.

    Each step is removed from the layer that is furthest behind its budget.
    """
    removed = [0] * len(steps)
    taken = [0] * len(steps)
    heap = [(-budget, index) for index, budget in enumerate(budgets) if steps[index]]
    heapq.heapify(heap)
    missing = sum(budgets)
    while heap:
        _, index = heapq.heappop(heap)
        step = steps[index][taken[index]] * per_channel
        if abs(missing - step) >= abs(missing):
            break
        missing -= step
        removed[index] += steps[index][taken[index]]
        taken[index] += 1
        if taken[index] < len(steps[index]):
            heapq.heappush(heap, (removed[index] * per_channel - budgets[index], index))
    return removed


def _parameters(shape: LayerShape, cost: UnitCost) -> int:
    return shape.kv_groups * cost.kv_group + shape.channels_per_expert * cost.channel
