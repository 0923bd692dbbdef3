"""The named methods: which scorer, which allocator, which recovery. One table, one line each."""

from dataclasses import dataclass
from typing import Literal

Scorer = Literal[
    "flap", "llm-pruner", "loraprune", "lorap", "magnitude", "movement", "obs", "piem", "random", "slimllm", "wanda"
]
"""Names in ``MODEL_SCORERS`` and ``LAYERWISE_SCORERS`` of ``secateur.engine.scoring``."""

Allocator = Literal["cosine", "inner", "lsps", "threshold", "uniform"]
"""Names in ``secateur.engine.allocation.ALLOCATORS``."""

RecoveryKind = Literal["none", "bias", "linear-regression", "least-squares", "lora", "distill"]
"""``none``, names in ``secateur.engine.recovery.LAYERWISE_RECOVERIES``, which mend a layer as it is cut, and :data:`TRAINED`."""

DAMPING = 0.3
"""Of the least-squares refit, where neither the request nor the method says otherwise."""
TRAINED = frozenset({"lora", "distill"})
"""Recoveries that train when all is cut: one more round of each target."""
BIASING = frozenset({"bias", "linear-regression"})
"""Recoveries that give output projections a bias where there was none."""
GRADIENT_SCORERS = frozenset({"llm-pruner", "loraprune", "movement", "piem"})
GRADIENT_ALLOCATORS = frozenset({"lsps"})
LAYERWISE_SCORERS = frozenset({"lorap", "obs", "slimllm", "wanda"})
"""They see one layer at a time, when those before it are cut: ``LAYERWISE_SCORERS`` of ``secateur.engine.scoring``."""
RANKING_ALLOCATORS = frozenset({"threshold"})
"""They rank the units of all layers before anything is cut: no layer-wise scorer will do."""


@dataclass(frozen=True)
class Method:
    """A pruning method as the papers name it; ``passes`` says what a round costs beside measuring, in words."""

    name: str
    summary: str
    paper: str
    equations: str
    scoring: Scorer
    allocation: Allocator
    recovery: RecoveryKind = "none"
    passes: str = "none"
    default_rounds: int = 1
    refit_target: Literal["model", "layer"] = "model"
    refit_damping: float = DAMPING
    dynamic: bool = False
    """Whether the published model chooses its units itself, for each prompt: nothing is cut."""

    @property
    def needs_gradients(self) -> bool:
        return self.dynamic or self.scoring in GRADIENT_SCORERS or self.allocation in GRADIENT_ALLOCATORS


PIEM_PAPER = "Wang, Structured Compression of Large Language Models with Sensitivity-aware Pruning Mechanisms"
PIEM_PASSES = (
    "two forwards and one backward over the calibration tokens; where affordable, one partial forward for each KV group"
)
LAYERWISE_PASSES = "one forward of every layer before and one after it is cut"

METHODS: dict[str, Method] = {
    method.name: method
    for method in (
        Method("secateur", "ours: SlimLLM's layer ratios, second-order selection, damped least-squares refit towards the unpruned model on the pruned prefix", "Secateur", "docs/methods.md", "obs", "cosine", "least-squares", passes=f"one forward for the ratios, {LAYERWISE_PASSES}, one of the unpruned model beside it"),
        Method("secateur-gradient", "ours, with gradients: PIEM scores in several rounds, SlimLLM's layer ratios, a gentle least-squares refit; loses least where little goes", "Secateur", "docs/methods.md", "piem", "cosine", "least-squares", passes=f"one forward for the ratios, {PIEM_PASSES}, {LAYERWISE_PASSES}", default_rounds=4, refit_target="layer", refit_damping=10.0),
        Method("piem-lsps", "PIEM scores, LSPS layer ratios: the paper's full method", PIEM_PAPER, "section 3.2 and 3.3", "piem", "lsps", passes=PIEM_PASSES, default_rounds=4),
        Method("piem", "PIEM scores, the same ratio in every layer", PIEM_PAPER, "section 3.2", "piem", "uniform", passes=PIEM_PASSES),
        Method("lsps", "L1 scores, LSPS layer ratios", PIEM_PAPER, "section 3.3", "magnitude", "lsps", passes="two forwards and one backward over the calibration tokens"),
        Method("slimllm", "Pearson similarity of heads with greedy swaps, channels in feature space, cosine layer ratios, linear regression", "Guo et al., SlimLLM: Accurate Structured Pruning for Large Language Models", "4 to 11, algorithm 1", "slimllm", "cosine", "linear-regression", passes=f"one forward for the ratios, {LAYERWISE_PASSES}"),
        Method("flap", "fluctuation of the inputs times the output weights, standardised and compared across layers, bias compensation", "An et al., Fluctuation-based Adaptive Structured Pruning for Large Language Models", "3 to 8", "flap", "threshold", "bias", passes=f"one forward for the statistics, {LAYERWISE_PASSES}"),
        Method("wanda", "weight magnitude times input norm, summed over a unit's output weights", "Sun et al., A Simple and Effective Pruning Approach for Large Language Models", "1, structured as in An et al.", "wanda", "uniform", passes=LAYERWISE_PASSES),
        Method("sparsegpt", "optimal brain surgeon's error of a unit, with its update of the weights that stay", "Frantar and Alistarh, SparseGPT: Massive Language Models Can Be Accurately Pruned in One-Shot", "3 and 4, over whole units", "obs", "uniform", "least-squares", passes=LAYERWISE_PASSES, refit_target="layer", refit_damping=0.01),
        Method("llm-pruner", "first-order Taylor importance over coupled weights", "Ma et al., LLM-Pruner: On the Structural Pruning of Large Language Models", "3 to 5", "llm-pruner", "inner", passes="one forward and one backward over the calibration tokens"),
        Method("loraprune", "the same importance from the gradients of low-rank adapters", "Zhang et al., LoRAPrune: Structured Pruning Meets Low-Rank Parameter-Efficient Fine-Tuning", "6 to 10", "loraprune", "inner", passes="a few training steps of adapters over the calibration tokens", default_rounds=4),
        Method("lorap", "low-rank attention is not to be had in a stock checkpoint: its input-weighted norms for channels and, likewise, heads", "Li et al., LoRAP: Transformer Sub-Layers Deserve Differentiated Structured Compression for Large Language Models", "7 to 9", "lorap", "uniform", passes=LAYERWISE_PASSES),
        Method("movement", "accumulated −w·∂L/∂w over some training steps", "Sanh et al., Movement Pruning: Adaptive Sparsity by Fine-Tuning", "section 4", "movement", "uniform", passes="a few training steps over the calibration tokens", default_rounds=4),
        Method("magnitude", "L1 norm of a unit's weights, the same ratio in every layer", "Han et al., Learning both Weights and Connections for Efficient Neural Networks", "section 3", "magnitude", "uniform"),
        Method("dsgp", "the whole model reads a prompt and measures what it needs; the units with the most energy in prompt and calibration text, gathered into smaller weights, write on", "Zhu et al., Dynamic Structured Pruning for LLMs based on Real-Time Sensitivity Analysis", "abstract; docs/dynamic.md", "wanda", "threshold", passes="two forwards and one backward over the calibration tokens, one forward", dynamic=True),
        Method("random", "units drawn at random, the same ratio in every layer: the floor", "none", "none", "random", "uniform"),
    )
}  # fmt: skip

STATIC_METHODS = [name for name, method in METHODS.items() if not method.dynamic]
"""Those that cut."""
