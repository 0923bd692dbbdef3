"""Recover what pruning lost: layer-wise recovery while layers are cut, and training after the last cut."""

from secateur.engine.recovery import bias, least_squares, linear_regression
from secateur.engine.recovery.base import Cut, LayerwiseRecovery
from secateur.engine.recovery.training import Segment, train

LAYERWISE_RECOVERIES: dict[str, LayerwiseRecovery] = {
    "bias": bias.recover,
    "least-squares": least_squares.recover,
    "linear-regression": linear_regression.recover,
}
"""Layer-wise recoveries, by the name that a request gives them."""

__all__ = ["LAYERWISE_RECOVERIES", "Cut", "LayerwiseRecovery", "Segment", "train"]
