"""What wins back what pruning lost: layer by layer as it is cut, or by training when all is cut."""

from workers.engine.recovery import bias, least_squares, linear_regression
from workers.engine.recovery.base import Cut, Mend
from workers.engine.recovery.training import Segment, train

MENDS: dict[str, Mend] = {
    "bias": bias.mend,
    "least-squares": least_squares.mend,
    "linear-regression": linear_regression.mend,
}
"""By the name that a request gives them."""

__all__ = ["MENDS", "Cut", "Mend", "Segment", "train"]
