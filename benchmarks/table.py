"""Tables in Markdown: means and spreads over seeds."""

import math
import statistics
from collections.abc import Sequence

NONE = "–"


def excess_loss(perplexity: float, unpruned: float) -> float:
    """Return the loss that pruning adds, in nats per token: ln(ppl) − ln(ppl of the unpruned model)."""
    return math.log(perplexity) - math.log(unpruned)


def perplexity_cell(values: Sequence[float]) -> str:
    """Return the geometric mean over seeds, with the smallest and the largest value if they differ."""
    if not values:
        return NONE
    mean = _perplexity(math.exp(statistics.mean(math.log(value) for value in values)))
    low, high = _perplexity(min(values)), _perplexity(max(values))
    return mean if low == high else f"{mean} ({low} to {high})"


def mean_cell(values: Sequence[float], digits: int) -> str:
    """Return the mean over seeds, with the standard deviation if there are several seeds."""
    if not values:
        return NONE
    mean = f"{statistics.mean(values):.{digits}f}"
    return mean if len(values) == 1 or math.inf in values else f"{mean} ± {statistics.stdev(values):.{digits}f}"


def markdown(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a table with one line for the heads and one for each row."""
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (heads, ["---"] * len(heads), *rows))


def _perplexity(value: float) -> str:
    return f"{value:.1f}" if value < 1000 else f"{value:.1e}"
