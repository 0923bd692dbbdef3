"""The report of a pruning run and the steps of the run: what was measured of the unpruned model and after each step.

``docs/evaluation.md`` defines every figure.
"""

from enum import StrEnum
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

When = Literal["before", "after"]


class _Data(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class ComponentNames(_Data):
    """The names of the components that pruned the model, as ``GET /v1/methods`` lists them."""

    scorer: str
    allocator: str
    layerwise_recovery: str
    training: str | None = None


class LayerWidths(_Data):
    """The sizes of one layer, from which the number of its units of every structure follows.

    A layer without attention has no KV groups, and a layer without feed-forward has no channels.
    """

    layer: int = Field(description="Index of the layer, from 0.")
    kv_groups: int
    heads: int = Field(description="Query heads of all KV groups.")
    channels: int = Field(description="Feed-forward channels; in a mixture of experts, of each expert.")
    experts: int = Field(1, description="Experts of a mixture; 1 in a layer without a mixture.")


class ReachedRatio(_Data):
    """A ratio as it was planned, and the ratio that whole units reach."""

    target: float
    reached: float


class Spread(_Data):
    """The fastest and the slowest repeat of each quantity, in the unit that the field's name gives."""

    prefill_ms: tuple[float, float]
    decode_ms_per_token: tuple[float, float]


class Latency(_Data):
    """The prefill and decoding times, as medians over ``repeats``."""

    prefill_ms: float
    decode_ms_per_token: float = Field(description="Time of one decoding step of the whole batch.")
    tokens_per_second: float = Field(description="Decoded tokens of all sequences of the batch.")
    energy_joules_per_token: float | None = Field(description="Null where the machine counts no energy.")
    spread: Spread
    prefill_tokens: int
    decode_tokens: int
    batch_size: int
    repeats: int
    peak_memory_bytes: int = Field(description="The device's peak on CUDA, the process's peak resident set on a CPU.")
    device: str
    threads: int


class TaskScore(_Data):
    """The score of one model on a zero-shot task."""

    metric: str
    value: float
    stderr: float | None
    examples: int
    source: str


class Benchmarks(_Data):
    """The scores of one model on the requested texts and tasks, by name."""

    perplexity: dict[str, float | None] = Field(description="Null: infinite.")
    zero_shot: dict[str, TaskScore]


class Continuation(_Data):
    """The text that one model generates from a prompt."""

    prompt: str
    text: str


class Measurement(_Data):
    """The figures that are measured of a model.

    ``benchmarks``, ``generations`` and ``latency`` are measured only of the unpruned model and after a target ratio's
    last step.
    """

    perplexity: float | None = Field(None, description="On the evaluation text; null: infinite.")
    nats_per_byte: float | None = Field(
        None,
        description="Loss of the evaluation text by its bytes in UTF-8, which models with different vocabularies have in common; measured of requests with `vocabulary`. Null: infinite.",
    )
    parameters: int | None = None
    prunable_parameters: int | None = None
    weights_bytes: int | None = None
    flops: int | None = Field(None, description="Of a prefill of 256 tokens.")
    benchmarks: Benchmarks | None = None
    generations: list[Continuation] | None = None
    latency: Latency | None = None


class TrainingCurve(_Data):
    """The progress of a training, and the mean token loss of each optimizer step in nats."""

    kind: str
    step: int
    steps: int
    loss: list[float]


class StepKind(StrEnum):
    """The kind of a step of a run."""

    BASELINE = "baseline"
    """The unpruned model was measured."""
    TRIAL = "trial"
    """A split of the ratio among structures that compete was tried; the model that it left is not kept."""
    ROUND = "round"
    """A pruning round is complete."""
    TRAINING = "training"
    """A part of the training is complete; the model is measured after the last part for a target ratio."""


class Trial(_Data):
    """A split of the ratio among structures that compete: what was removed whole, and the loss of the pruned model."""

    removed: dict[str, int] = Field(
        description="Whole units by structure, of experts in every layer; widths gave the rest of the ratio."
    )
    loss: float | None = Field(
        description="Mean loss of a token in nats, on calibration windows on which the trial was not calibrated; null: infinite."
    )


class Step(Measurement):
    """One entry of a run's history. ``number`` 0 is the baseline; numbers continue from one target ratio to the next."""

    number: int
    kind: StepKind
    target_ratio: float | None = Field(None, description="The ratio of the target that the step belongs to.")
    ratio: ReachedRatio | None = Field(None, description="The ratio after the step.")
    widths: list[LayerWidths] | None = None
    sensitivity: list[float] | None = Field(None, description="What the allocator found of each layer.")
    trials: list[Trial] | None = Field(
        None, description="Of structures that compete: what was tried; in a round, all of it, the taken split first."
    )
    shielding: Literal["exact", "estimate"] | None = Field(None, description="Scorer `piem`: how ΔL was found.")
    training: TrainingCurve | None = None
    prior_weight: float | None = Field(None, description="Method `dsgp`: the weight of the calibration text.")
    seconds: float | None = Field(None, description="Duration of the step, with measuring.")

    def as_dict(self) -> dict[str, Any]:
        """Return the step as JSON-able data, without the fields that were not set."""
        return self.model_dump(mode="json", exclude_unset=True)


class Change(_Data):
    """A quantity of the unpruned model and the same quantity of the pruned model."""

    before: float | None
    after: float | None


class CountChange(_Data):
    """A whole number of the unpruned model and the same number of the pruned model."""

    before: int | None
    after: int | None


class ParameterChange(_Data):
    """The parameters of the whole model, and the prunable parameters, before and after pruning."""

    before: int
    after: int
    prunable_before: int
    prunable_after: int


class VocabularyChange(_Data):
    """The tokens of the model before and after the vocabulary was cut, and the bytes of the embedding and the head."""

    before: int
    after: int
    growth: float = Field(
        description="By which share texts of the requested kind take more tokens: 0.01 is 1 %. Measured on texts that had no say in the choice of tokens."
    )
    bytes_before: int = Field(description="Bytes of the embedding and the head; tied tables count once.")
    bytes_after: int


class LatencyChange(_Data):
    """The latency of the unpruned model and of the pruned model; null when it was not measured."""

    before: Latency | None
    after: Latency | None


class WidthChange(_Data):
    """The widths of every layer, before and after pruning."""

    before: list[LayerWidths]
    after: list[LayerWidths]


class TaskChange(_Data):
    """The scores of the unpruned and the pruned model on a zero-shot task."""

    metric: str
    before: float
    after: float
    before_stderr: float | None
    after_stderr: float | None
    examples: int
    source: str


class BenchmarkChange(_Data):
    """The scores of the unpruned and the pruned model on the requested texts and tasks, by name."""

    perplexity: dict[str, Change]
    zero_shot: dict[str, TaskChange]
    zero_shot_mean: Change | None


class GenerationChange(_Data):
    """The texts that the unpruned and the pruned model generate from a prompt."""

    prompt: str
    before: str
    after: str


class Source(_Data):
    """The model that was pruned."""

    model_id: str
    revision: str | None = Field(description="The commit; null for a model that is not on the Hub.")
    gguf_file: str | None
    fingerprint: str = Field(description="Changes when the weights may have changed.")
    family: str
    model_type: str


class RatioSummary(_Data):
    """The ratio, and the shares of all parameters and of the FLOPs that were removed."""

    target: float
    reached: float
    of_all_parameters: float
    of_flops: float


class Published(_Data):
    """The size of the published files, which includes the zeros of the layout `padded`."""

    parameters: int
    weights_bytes: int


class Text(_Data):
    """The tokens that the model was calibrated or measured on."""

    source: str
    windows: int
    sequence_length: int
    tokens: int


class Report(_Data):
    """The report of one pruned model; a run with several target ratios has one report for each."""

    source: Source
    spec: dict[str, Any] = Field(description="How to prune, as requested, with defaults filled in.")
    components: ComponentNames
    rounds: int = Field(description="Pruning rounds.")
    ratio: RatioSummary
    redundancy_removed: float = Field(description="Share of the units that was removed.")
    benchmarks: BenchmarkChange
    retained_accuracy: float | None = Field(
        description="Mean zero-shot accuracy after, as a share of that before; null without tasks."
    )
    generations: list[GenerationChange]
    parameters: ParameterChange
    perplexity: Change = Field(
        description="On the evaluation text; null: infinite. It is a figure per token: where the vocabulary was cut, the two models' tokens differ, and `nats_per_byte` compares them."
    )
    nats_per_byte: Change | None = Field(
        None,
        description="Loss of the evaluation text by its bytes in UTF-8, where the vocabulary was cut; null of a change: infinite.",
    )
    vocabulary: VocabularyChange | None = Field(None, description="Null where all tokens stayed by request.")
    flops: CountChange
    weights_bytes: CountChange
    latency: LatencyChange
    peak_memory_bytes: CountChange
    widths: WidthChange
    steps: list[Step] = Field(description="Rounds, and the training where there was any.")
    calibration: Text
    evaluation: Text
    dtype: str
    device: str
    seed: int
    versions: dict[str, str]
    seconds: float | None = Field(None, description="Since the run began.")
    published: Published | None = None

    def as_dict(self) -> dict[str, Any]:
        """Return the report as JSON-able data."""
        return {**self.model_dump(mode="json", exclude={"steps"}), "steps": [step.as_dict() for step in self.steps]}
