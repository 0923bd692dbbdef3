"""From a budget of parameters by layer to whole units: which the rounding may not change by more than one block.

Shared by every allocator: a method decides how much each layer gives, this file turns that into KV groups and blocks of
channels so that the whole meets the target to within half a block.
"""

import heapq
from collections.abc import Sequence

import torch
from torch import Tensor

from app.catalog.architectures import LayerShape, UnitCost, channel_steps
from workers.engine.plan import LayerPlan, Plan
from workers.engine.scoring.base import Scores


def select_units(
    shapes: Sequence[LayerShape],
    scores: Scores,
    budgets: Sequence[float],
    kv_groups: int,
    cost: UnitCost,
    width_multiple: int,
) -> Plan:
    """Keep the best-scored units of every layer under its budget, ``M(l) = {u : S(u) < quantile_τ(l)}``.

    The paper prints Quantile_{1−τ} with one letter for threshold and ratio; that the *lowest* τ(l) of a layer goes is the
    reading that makes sense. ``budgets`` are parameters to remove by layer, ``kv_groups`` how many groups all layers together
    give; channels make up the rest of the budgets, whose sum is met to within half a block of ``width_multiple`` channels
    as long as the layers have them to give.
    """
    group_order = [torch.argsort(values, stable=True).tolist() for values in scores.heads]
    groups = _spread_groups(shapes, scores, group_order, budgets, kv_groups, cost)
    left = [budget - count * cost.kv_group for budget, count in zip(budgets, groups, strict=True)]
    steps = [channel_steps(shape.intermediate_size, width_multiple) for shape in shapes]
    removed = _spread_channels(steps, left, cost.channel)
    return Plan(
        tuple(
            LayerPlan(tuple(sorted(order[count:])), _best(values, shape.intermediate_size - channels))
            for shape, order, count, values, channels in zip(
                shapes, group_order, groups, scores.channels, removed, strict=True
            )
        )
    )


def _best(scores: Tensor, count: int) -> tuple[int, ...]:
    return tuple(sorted(torch.argsort(scores, stable=True)[len(scores) - count :].tolist()))


def _spread_groups(
    shapes: Sequence[LayerShape],
    scores: Scores,
    order: list[list[int]],
    budgets: Sequence[float],
    count: int,
    cost: UnitCost,
) -> list[int]:
    """``count`` KV groups to remove, by layer: each layer's share of its budget, rounded down or up.

    A layer has few groups, so most of its share is a fraction. Which layers round up is decided by the score of the
    group that would go: scores are comparable across layers, by α(l).
    """
    shares = [
        shape.kv_groups * budget / _parameters(shape, cost) for shape, budget in zip(shapes, budgets, strict=True)
    ]
    removed = [0] * len(shapes)

    def claim(index: int) -> tuple[int, float, int]:
        candidate = order[index][removed[index]]
        missing = shares[index] - removed[index]
        urgency = 0 if missing >= 1 else 1 if missing > 1e-6 else 2
        return (urgency, float(scores.heads[index][candidate]), index)

    heap = [claim(index) for index, shape in enumerate(shapes) if shape.kv_groups > 1]
    heapq.heapify(heap)
    for _ in range(count):
        _, _, index = heapq.heappop(heap)
        removed[index] += 1
        if removed[index] < shapes[index].kv_groups - 1:
            heapq.heappush(heap, claim(index))
    return removed


def _spread_channels(steps: list[list[int]], budgets: list[float], per_channel: int) -> list[int]:
    """Channels to remove by layer, in whole steps: the next step always goes to the layer furthest behind its budget."""
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
    return shape.kv_groups * cost.kv_group + shape.intermediate_size * cost.channel
