"""The named methods, and the scorers, allocators and recoveries that methods consist of.

Each table is an open set with one line for each entry, and each entry lists what it needs. The memory estimate, the
checks of a request, the documentation and ``GET /v1/methods`` read the needs here. The functions of the same names are
in ``secateur.engine``.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, WithJsonSchema
from pydantic_core import PydanticCustomError

from secateur.catalog.structures import DEPTH, STRUCTURES, WIDTHS
from secateur.catalog.tables import by_name

DEFAULT_METHOD = "secateur"
"""The method of the library and the command line, unless the caller names another one."""
DAMPING = 0.3
"""The damping of the least-squares recovery, unless the request or the method sets another value."""

FitTo = Literal["model", "layer"]


class Need(StrEnum):
    """A kind of information about the model that a scorer, an allocator or a recovery needs."""

    FORWARD = "forward"
    """Statistics of one forward pass over the calibration tokens."""
    GATES = "gates"
    """Gradients of the loss with respect to every unit's gate."""
    GRADIENTS = "gradients"
    """Gradients of the loss with respect to weights."""
    MOMENTS = "moments"
    """Second moments of the inputs of each output projection, layer by layer, after the layers before it were cut."""
    SOLVE = "solve"
    """A factorisation of the second moments."""
    REFERENCE = "reference"
    """The unpruned model beside the model that is pruned."""
    BACKWARD = "backward"
    """A backward pass through all layers at once, as in training."""


@dataclass(frozen=True)
class Scorer:
    """A way to score units; the function of the same name is in ``secateur.engine.scoring``."""

    name: str
    needs: frozenset[Need] = frozenset()
    structures: tuple[str, ...] = WIDTHS
    """The structures whose units the scorer scores."""

    @property
    def layerwise(self) -> bool:
        """Whether the scorer scores one layer at a time, after the layers before were cut.

        A layer-wise scorer has no scores of the whole model.
        """
        return Need.MOMENTS in self.needs


SCORERS = by_name(
    Scorer("compensated-loss", structures=DEPTH),
    Scorer("flap", frozenset({Need.FORWARD})),
    Scorer("frequency", structures=("experts",)),
    Scorer("llm-pruner", frozenset({Need.GRADIENTS})),
    Scorer("loraprune", frozenset({Need.GRADIENTS})),
    Scorer("lorap", frozenset({Need.MOMENTS})),
    Scorer("magnitude"),
    Scorer("movement", frozenset({Need.GRADIENTS})),
    Scorer("obs", frozenset({Need.MOMENTS, Need.SOLVE})),
    Scorer("piem", frozenset({Need.GATES})),
    Scorer("random", structures=(*WIDTHS, "experts")),
    Scorer("reap", structures=("experts",)),
    Scorer("shortgpt", structures=DEPTH),
    Scorer("sleb", structures=DEPTH),
    Scorer("slimllm", frozenset({Need.MOMENTS})),
    Scorer("wanda", frozenset({Need.MOMENTS})),
)


@dataclass(frozen=True)
class Allocator:
    """A way to spread the ratio over the layers; the function of the same name is in ``secateur.engine.allocation``."""

    name: str
    needs: frozenset[Need] = frozenset()
    ranks: bool = False
    """Whether the allocator ranks the units of all layers before any layer is cut.

    A layer-wise scorer has no scores for such a ranking.
    """


ALLOCATORS = by_name(
    Allocator("cosine", frozenset({Need.FORWARD})),
    Allocator("inner"),
    Allocator("lsps", frozenset({Need.GATES})),
    Allocator("threshold", ranks=True),
    Allocator("uniform"),
)


@dataclass(frozen=True)
class LayerwiseRecovery:
    """A correction of each layer as it is cut, from statistics of the calibration text.

    The function of the same name is in ``secateur.engine.recovery``.
    """

    name: str
    needs: frozenset[Need] = frozenset()
    fits: bool = False
    """Whether the recovery fits a layer to other outputs, which ``recovery.layerwise.fit_to`` chooses."""
    adds_bias: bool = False
    """Whether the recovery adds a bias to output projections that have none.

    Stock classes and experts have no place for an added bias.
    """


NO_RECOVERY = "none"
LAYERWISE_RECOVERIES = by_name(
    LayerwiseRecovery(NO_RECOVERY),
    LayerwiseRecovery("bias", frozenset({Need.MOMENTS}), adds_bias=True),
    LayerwiseRecovery("linear-regression", frozenset({Need.MOMENTS, Need.SOLVE}), adds_bias=True),
    LayerwiseRecovery("least-squares", frozenset({Need.MOMENTS, Need.SOLVE}), fits=True),
)


@dataclass(frozen=True)
class Training:
    """A training of the pruned model after the last round.

    The function of the same name is in ``secateur.engine.recovery.training``.
    """

    name: str
    needs: frozenset[Need] = frozenset({Need.BACKWARD})
    all_weights: bool = False
    """Whether the training changes all weights of the blocks, instead of adapters alone."""


TRAININGS = by_name(
    Training("lora"),
    Training("distill", frozenset({Need.BACKWARD, Need.REFERENCE}), all_weights=True),
)


@dataclass(frozen=True)
class Method:
    """A pruning method as its paper names it: a scorer, an allocator and a layer-wise recovery."""

    name: str
    summary: str
    paper: str
    equations: str
    scorer: str
    allocator: str
    layerwise_recovery: str = NO_RECOVERY
    passes: str = "none"
    """The cost of a round in passes over the calibration tokens, in words, without the cost of measuring."""
    default_rounds: int = 1
    fit_to: FitTo = "model"
    damping: float = DAMPING
    dynamic: bool = False
    """Whether the published model chooses its units for each prompt; a dynamic method cuts nothing."""
    also: tuple[str, ...] = ()
    """The scorers of structures that ``scorer`` does not score."""

    @property
    def structures(self) -> tuple[str, ...]:
        """The structures that the method cuts, unless the request names others."""
        own = SCORERS[self.scorer].structures
        return WIDTHS if own[: len(WIDTHS)] == WIDTHS else own[:1]

    @property
    def scorers(self) -> dict[str, str]:
        """The name of the method's own scorer of each structure that it scores."""
        found: dict[str, str] = {}
        for name in (self.scorer, *self.also):
            for structure in SCORERS[name].structures:
                found.setdefault(structure, name)
        return found

    @property
    def needs(self) -> frozenset[Need]:
        """Everything that the components of the method need of the model."""
        if self.dynamic:
            return frozenset({Need.GATES, Need.FORWARD})
        components = SCORERS[self.scorer], ALLOCATORS[self.allocator], LAYERWISE_RECOVERIES[self.layerwise_recovery]
        return frozenset[Need]().union(*(component.needs for component in components))

    @property
    def needs_gradients(self) -> bool:
        return bool(self.needs & {Need.GATES, Need.GRADIENTS})


PIEM_PAPER = "Wang, Structured Compression of Large Language Models with Sensitivity-aware Pruning Mechanisms"
PIEM_PASSES = (
    "two forwards and one backward over the calibration tokens; where affordable, one partial forward for each KV group"
)
LAYERWISE_PASSES = "one forward of every layer before and one after it is cut"

METHODS = by_name(
    Method("secateur", "ours: SlimLLM's layer ratios, second-order selection, damped least-squares refit towards the unpruned model on the pruned prefix", "Secateur", "docs/methods.md", "obs", "cosine", "least-squares", passes=f"one forward for the ratios, {LAYERWISE_PASSES}, one of the unpruned model beside it", also=("compensated-loss", "reap")),
    Method("secateur-gradient", "ours, with gradients: PIEM scores in several rounds, SlimLLM's layer ratios, a strongly damped least-squares recovery; best at small ratios", "Secateur", "docs/methods.md", "piem", "cosine", "least-squares", passes=f"one forward for the ratios, {PIEM_PASSES}, {LAYERWISE_PASSES}", default_rounds=4, fit_to="layer", damping=10.0),
    Method("piem-lsps", "PIEM scores, LSPS layer ratios: the paper's full method", PIEM_PAPER, "section 3.2 and 3.3", "piem", "lsps", passes=PIEM_PASSES, default_rounds=4),
    Method("piem", "PIEM scores, the same ratio in every layer", PIEM_PAPER, "section 3.2", "piem", "uniform", passes=PIEM_PASSES),
    Method("lsps", "L1 scores, LSPS layer ratios", PIEM_PAPER, "section 3.3", "magnitude", "lsps", passes="two forwards and one backward over the calibration tokens"),
    Method("slimllm", "Pearson similarity of heads with greedy swaps, channels in feature space, cosine layer ratios, linear regression", "Guo et al., SlimLLM: Accurate Structured Pruning for Large Language Models", "4 to 11, algorithm 1", "slimllm", "cosine", "linear-regression", passes=f"one forward for the ratios, {LAYERWISE_PASSES}"),
    Method("flap", "fluctuation of the inputs times the output weights, standardised and compared across layers, bias compensation", "An et al., Fluctuation-based Adaptive Structured Pruning for Large Language Models", "3 to 8", "flap", "threshold", "bias", passes=f"one forward for the statistics, {LAYERWISE_PASSES}"),
    Method("wanda", "weight magnitude times input norm, summed over a unit's output weights", "Sun et al., A Simple and Effective Pruning Approach for Large Language Models", "1, structured as in An et al.", "wanda", "uniform", passes=LAYERWISE_PASSES),
    Method("sparsegpt", "optimal brain surgeon's error of a unit, with its update of the weights that stay", "Frantar and Alistarh, SparseGPT: Massive Language Models Can Be Accurately Pruned in One-Shot", "3 and 4, over whole units", "obs", "uniform", "least-squares", passes=LAYERWISE_PASSES, fit_to="layer", damping=0.01),
    Method("llm-pruner", "first-order Taylor importance over coupled weights", "Ma et al., LLM-Pruner: On the Structural Pruning of Large Language Models", "3 to 5", "llm-pruner", "inner", passes="one forward and one backward over the calibration tokens"),
    Method("loraprune", "the same importance from the gradients of low-rank adapters", "Zhang et al., LoRAPrune: Structured Pruning Meets Low-Rank Parameter-Efficient Fine-Tuning", "6 to 10", "loraprune", "inner", passes="a few training steps of adapters over the calibration tokens", default_rounds=4),
    Method("lorap", "input-weighted norms for channels and, in the same way, heads; LoRAP's low-rank attention does not fit a stock checkpoint", "Li et al., LoRAP: Transformer Sub-Layers Deserve Differentiated Structured Compression for Large Language Models", "7 to 9", "lorap", "uniform", passes=LAYERWISE_PASSES),
    Method("movement", "accumulated −w·∂L/∂w over some training steps", "Sanh et al., Movement Pruning: Adaptive Sparsity by Fine-Tuning", "section 4", "movement", "uniform", passes="a few training steps over the calibration tokens", default_rounds=4),
    Method("magnitude", "L1 norm of a unit's weights, the same ratio in every layer", "Han et al., Learning both Weights and Connections for Efficient Neural Networks", "section 3", "magnitude", "uniform"),
    Method("shortgpt", "whole layers that hardly change the direction of the hidden states are dropped", "Men et al., ShortGPT: Layers in Large Language Models are More Redundant Than You Expect", "1", "shortgpt", "threshold", passes="one forward"),
    Method("sleb", "whole layers are dropped one by one: each time the layer without which the loss is lowest", "Song et al., SLEB: Streamlining LLMs through Redundancy Verification and Elimination of Transformer Blocks", "algorithm 1", "sleb", "threshold", passes="for each dropped layer, one forward from every layer that is left"),
    Method("reap", "whole experts with the least router weight times output norm, over the tokens sent to them, are dropped; the same number in every layer", "Lasby et al., REAP the Experts: Why Pruning Prevails for One-Shot MoE Compression", "9", "reap", "uniform", passes="one forward"),
    Method("dsgp", "the whole model reads the prompt; then only the units with the most energy in prompt and calibration text generate the answer, from smaller weights", "Zhu et al., Dynamic Structured Pruning for LLMs based on Real-Time Sensitivity Analysis", "abstract; docs/dynamic.md", "wanda", "threshold", passes="two forwards and one backward over the calibration tokens, one forward", dynamic=True),
    Method("random", "units drawn at random, the same ratio in every layer: the floor", "none", "none", "random", "uniform"),
)  # fmt: skip

STATIC_METHODS = [name for name, method in METHODS.items() if not method.dynamic and method.structures == WIDTHS]
"""The names of the methods that cut KV groups and channels, which every model has."""


def _known(table: Mapping[str, Any]) -> AfterValidator:
    """Return a validator that accepts only the names of ``table``."""

    def check(name: str) -> str:
        if name not in table:
            shown = name[:64].encode(errors="replace").decode()  # UTF-8 has no form for a lone surrogate
            known = {"name": shown, "allowed": ", ".join(table), "expected": ", ".join(f"'{each}'" for each in table)}
            raise PydanticCustomError("unknown_name", "there is no '{name}'; allowed: {allowed}", known)
        return name

    return AfterValidator(check)


def _enum(table: Mapping[str, Any]) -> WithJsonSchema:
    return WithJsonSchema({"type": "string", "enum": list(table)})


# Each type is for request fields whose value is the name of a table's entry.
MethodName = Annotated[str, _known(METHODS), _enum(METHODS)]
ScorerName = Annotated[str, _known(SCORERS), _enum(SCORERS)]
AllocatorName = Annotated[str, _known(ALLOCATORS), _enum(ALLOCATORS)]
StructureName = Annotated[str, _known(STRUCTURES), _enum(STRUCTURES)]
LayerwiseRecoveryName = Annotated[str, _known(LAYERWISE_RECOVERIES), _enum(LAYERWISE_RECOVERIES)]
TrainingName = Annotated[str, _known(TRAININGS), _enum(TRAININGS)]
