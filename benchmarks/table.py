"""Numbers to Markdown: means and spreads over seeds, in tables."""

import math
import statistics
from collections.abc import Sequence

NONE = "–"


def excess_loss(perplexity: float, unpruned: float) -> float:
    """What pruning costs, in nats a token: ln(ppl) − ln(ppl of the unpruned model)."""
    return math.log(perplexity) - math.log(unpruned)


def perplexity_cell(values: Sequence[float]) -> str:
    """Geometric mean over seeds, with the smallest and the largest where they differ."""
    if not values:
        return NONE
    mean = _perplexity(math.exp(statistics.mean(math.log(value) for value in values)))
    low, high = _perplexity(min(values)), _perplexity(max(values))
    return mean if low == high else f"{mean} ({low} to {high})"


def mean_cell(values: Sequence[float], digits: int) -> str:
    """Mean over seeds, with the standard deviation where there are several."""
    if not values:
        return NONE
    mean = f"{statistics.mean(values):.{digits}f}"
    return mean if len(values) == 1 or math.inf in values else f"{mean} ± {statistics.stdev(values):.{digits}f}"


def markdown(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table, one line each for heads and rows."""
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (heads, ["---"] * len(heads), *rows))


def _perplexity(value: float) -> str:
    return f"{value:.1f}" if value < 1000 else f"{value:.1e}"
