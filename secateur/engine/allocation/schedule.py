"""Rounds: how much is gone after each of them."""

import math
from dataclasses import dataclass
from typing import Literal

from secateur.catalog.architectures import ModelShape


def cumulative_ratios(target: float, rounds: int, schedule: Literal["geometric", "cubic"]) -> list[float]:
    """Ratio removed after each round, the last exactly ``target``.

    ``geometric`` takes the same share of what is left each time; ``cubic`` is s_r = s·(1 − (1 − r/n)³), large steps first
    (Zhu and Gupta 2017, equation 1, with no initial sparsity).
    """
    shares = [round_ / rounds for round_ in range(1, rounds + 1)]
    if schedule == "cubic":
        return [target * (1 - (1 - share) ** 3) for share in shares[:-1]] + [target]
    return [1 - (1 - target) ** share for share in shares[:-1]] + [target]


@dataclass(frozen=True)
class RoundGoal:
    """What is gone of the source after a round: KV groups and parameters of channels, together ``ratio``."""

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
    """Every round's target, none beyond the last one's in either kind of unit: what is cut cannot be put back.

    Groups go as early as a round's ratio allows, so that channels are never asked for more than their final share.
    ``uniform``: as many in every layer.
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
