"""The named methods: which scorer, which allocator, which recovery. One table, one line each."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Method:
    """A pruning method as the papers name it.

    ``scoring`` and ``allocation`` are names in ``workers.engine.scoring.SCORERS`` and
    ``workers.engine.allocation.ALLOCATORS``; ``passes`` says what scoring costs a round, in words.
    """

    name: str
    summary: str
    paper: str
    equations: str
    scoring: str
    allocation: str
    recovery: str = "none"
    needs_gradients: bool = False
    passes: str = "none"
    default_rounds: int = 1


PIEM_PAPER = "Wang, Structured Compression of Large Language Models with Sensitivity-aware Pruning Mechanisms"
PIEM_PASSES = (
    "two forwards and one backward over the calibration tokens; where affordable, one partial forward for each KV group"
)

METHODS: dict[str, Method] = {
    method.name: method
    for method in (
        Method("piem-lsps", "PIEM scores, LSPS layer ratios: the paper's full method", PIEM_PAPER, "section 3.2 and 3.3", "piem", "lsps", needs_gradients=True, passes=PIEM_PASSES, default_rounds=4),
        Method("piem", "PIEM scores, the same ratio in every layer", PIEM_PAPER, "section 3.2", "piem", "uniform", needs_gradients=True, passes=PIEM_PASSES),
        Method("lsps", "L1 scores, LSPS layer ratios", PIEM_PAPER, "section 3.3", "magnitude", "lsps", needs_gradients=True, passes="two forwards and one backward over the calibration tokens"),
        Method("magnitude", "L1 norm of a unit's weights, the same ratio in every layer", "Han et al., Learning both Weights and Connections for Efficient Neural Networks", "section 3", "magnitude", "uniform"),
        Method("random", "units drawn at random, the same ratio in every layer: the floor", "none", "none", "random", "uniform"),
    )
}  # fmt: skip
