"""Rounds: how much is gone after each of them."""

from typing import Literal


def cumulative_ratios(target: float, rounds: int, schedule: Literal["geometric", "cubic"]) -> list[float]:
    """Ratio removed after each round, the last exactly ``target``.

    ``geometric`` takes the same share of what is left each time; ``cubic`` is s_r = s·(1 − (1 − r/n)³), large steps first
    (Zhu and Gupta 2017, equation 1, with no initial sparsity).
    """
    shares = [round_ / rounds for round_ in range(1, rounds + 1)]
    if schedule == "cubic":
        return [target * (1 - (1 - share) ** 3) for share in shares[:-1]] + [target]
    return [1 - (1 - target) ** share for share in shares[:-1]] + [target]
