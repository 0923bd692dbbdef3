"""Compute how much is removed after each round."""

import math
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
    """What is removed from the source after a round: KV groups and parameters of channels, together ``ratio``."""

    ratio: float
    kv_groups: int
    channel_parameters: float


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
    groups, channels = shape.split(ratio, width_multiple, uniform)
    together = len(shape.layers) if uniform else 1
    goals = []
    for reached in cumulative_ratios(ratio, rounds, schedule):
        wanted = reached * shape.prunable_parameters
        count = min(math.ceil(groups * reached / ratio - 1e-9), int(wanted // shape.cost.kv_group), groups)
        count = groups if reached == ratio else count // together * together
        goals.append(RoundGoal(reached, count, min(max(wanted - count * shape.cost.kv_group, 0.0), channels)))
    return goals
