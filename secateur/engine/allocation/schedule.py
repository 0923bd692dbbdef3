"""Compute how much is removed after each round."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from secateur.catalog.architectures import ModelShape


def cumulative_ratios(target: float, rounds: int, schedule: Literal["geometric", "cubic"]) -> list[float]:
    """Return the ratio removed after each round; the last one is exactly ``target``.

    ``geometric`` removes the same share of what is left in each round. ``cubic`` is s_r = s·(1 − (1 − r/n)³), which
    removes most in the first rounds (Zhu and Gupta 2017, equation 1, with no initial sparsity).
    """
    shares = [round_ / rounds for round_ in range(1, rounds + 1)]
    if schedule == "cubic":
        return [target * (1 - (1 - share) ** 3) for share in shares[:-1]] + [target]
    return [1 - (1 - target) ** share for share in shares[:-1]] + [target]


@dataclass(frozen=True)
class RoundGoal:
    """What is removed from the source after a round: parameters by structure, together ``ratio``."""

    ratio: float
    parameters: Mapping[str, float]


def round_goals(
    shape: ModelShape,
    ratio: float,
    rounds: int,
    schedule: Literal["geometric", "cubic"],
    width_multiple: int | None,
    uniform: bool = False,
) -> list[RoundGoal]:
    """Return the goal of every round.

    No goal exceeds the last one in KV groups or in channels, because a unit that is cut cannot be put back. KV groups
    are removed as early as the ratio of a round allows, so that no round requires more channels than the last one does.
    With ``uniform``, every layer loses the same number of KV groups.
    """
    last = shape.split(ratio, width_multiple, uniform)
    groups, channels = last["kv_groups"], last["channels"]
    prices = [shape.price("kv_groups", index) for index, layer in enumerate(shape.layers) if layer.kv_groups]
    step, together = max(prices, default=1), sum(prices) if uniform else 1
    goals = []
    for reached in cumulative_ratios(ratio, rounds, schedule):
        wanted = reached * shape.prunable_parameters
        amount = min(math.ceil(groups * reached / ratio / step - 1e-9) * step, int(wanted // step) * step, groups)
        amount = groups if reached == ratio else amount // together * together
        goals.append(RoundGoal(reached, {"kv_groups": amount, "channels": min(max(wanted - amount, 0.0), channels)}))
    return goals
