"""What is asked of the engine: the part of a job request that says how to prune, valid by construction."""

from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self, get_args

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationInfo, field_validator, model_validator

from secateur.catalog.architectures import ModelShape
from secateur.catalog.gguf import GgufKind, gguf_obstacle
from secateur.catalog.methods import (
    BIASING,
    LAYERWISE_SCORERS,
    METHODS,
    RANKING_ALLOCATORS,
    STATIC_METHODS,
    TRAINED,
    Allocator,
    Method,
    RecoveryKind,
    Scorer,
)
from secateur.contract.errors import PruningError
from secateur.contract.jobs import without_texts

MAX_RATIO = 0.9
MAX_TARGETS = 8
DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}

Layout = Literal["per-layer", "uniform", "padded"]
Format = Literal["safetensors", "gguf"]

ZERO_SHOT = {
    "boolq": "super_glue/boolq/default.yaml",
    "piqa": "piqa/piqa.yaml",
    "hellaswag": "hellaswag/hellaswag.yaml",
    "winogrande": "winogrande/default.yaml",
    "arc_easy": "arc/arc_easy.yaml",
    "arc_challenge": "arc/arc_challenge.yaml",
    "openbookqa": "openbookqa/openbookqa.yaml",
}
"""The papers' tasks, and where ``lm_eval`` keeps them."""

Text = Annotated[str, Field(min_length=1, max_length=1_000_000, pattern=r"^[^\x00]*$")]
"""Postgres stores no NUL."""
DatasetName = Annotated[str, Field(max_length=255, pattern=r"^[^\x00]+$")]
TaskName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,95}$")]
Prompt = Annotated[str, Field(min_length=1, max_length=4000, pattern=r"^[^\x00]*$")]


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class TextSource(_Part):
    """Where text comes from: a named data set, a file, or the texts themselves; neither: sampled from the model."""

    dataset: DatasetName | None = Field(
        None,
        description="`wikitext2`, `ptb`, `c4`, a Hub data set id (`org/name`, optionally `:config`), or `local:NAME`, a UTF-8 text file in the texts folder.",
        examples=["wikitext2"],
    )
    texts: list[Text] | None = Field(
        None,
        min_length=1,
        max_length=10_000,
        description="The texts themselves, as far as they fit into the largest request that the service takes (64 MiB, unless its operator says otherwise).",
    )
    samples: int = Field(32, ge=1, le=65_536, description="Windows of `sequence_length` tokens, at most.")
    sequence_length: int = Field(256, ge=8, le=8192, description="Tokens a window; capped at what the model takes.")

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        if self.dataset is not None and self.texts is not None:
            raise ValueError("give either 'dataset' or 'texts', not both")
        size = None if self.texts is None else sum(len(text.encode()) for text in self.texts)
        if size is not None and size < self.sequence_length:  # a token is a byte at least
            raise ValueError(f"the texts have {size} bytes, too short for one window of {self.sequence_length} tokens")
        return self


class Calibration(TextSource):
    """The tokens that scores are taken on. Neither ``dataset`` nor ``texts``: text sampled from the model itself."""


class Evaluation(TextSource):
    """Held-out text for perplexity. Neither ``dataset`` nor ``texts``: the last fifth of the calibration text, which is then
    not calibrated on; or sampled from the model, where there is no such text or too little."""

    latency: Literal[True, False, "slimllm"] = Field(
        True,
        description="Measure prefill and decode time and peak memory, before and after; `slimllm`: as the SlimLLM paper's table 3 does, decoding 256 tokens at batch 8, in 20 repeats.",
    )
    perplexity: list[DatasetName] = Field(
        [],
        max_length=8,
        description="Also on these texts, whole: `wikitext2`, `ptb`, `c4`, a Hub data set, or `local:NAME`.",
        examples=[["wikitext2", "ptb"]],
    )
    perplexity_length: int = Field(
        128, ge=8, le=8192, description="Tokens a window of these texts; 128 is the LLM-Pruner and SlimLLM papers'."
    )
    zero_shot: list[TaskName] = Field(
        [],
        max_length=32,
        description=f"Tasks that lm-eval scores, before and after: {', '.join(f'`{name}`' for name in ZERO_SHOT)}, or NAME of a file `NAME.jsonl` in the service's tasks folder.",
        examples=[["piqa", "arc_easy"]],
    )
    limit: int | None = Field(
        None, ge=1, description="The first so many examples of each task, and windows of each text; unset: all."
    )
    prompts: list[Prompt] | None = Field(
        None, max_length=8, description="What both models go on from, for the report; unset: three of ours."
    )

    @field_validator("perplexity", "zero_shot")
    @classmethod
    def _once(cls, names: list[str]) -> list[str]:
        if len(set(names)) < len(names):
            raise ValueError("a name stands there twice")
        return names


class Scoring(_Part):
    """What a unit is scored by. The coefficients of a scorer that was not asked for are ignored."""

    kind: Scorer | None = Field(None, description="Unset: the method's own.")
    lambda_weight: float = Field(0.1, ge=0, le=100, description="`piem`: λ1, the weight of the L1 norm.")
    lambda_loss: float = Field(1.0, ge=0, le=100, description="`piem`: λ2, the weight of the loss change.")
    gamma: float = Field(0.5, ge=0, le=100, description="`piem`: γ, the weight of the gradient term.")
    shielding: Literal["auto", "exact", "estimate"] = Field(
        "auto",
        description="`piem`: how a head's ΔL is found: by shielding it in a forward pass, by the estimate from its gate's gradient, or exactly where that is affordable.",
    )
    greedy_swaps: bool = Field(True, description="`slimllm`: refine the choice of heads by Algorithm 1.")
    feature_space: bool = Field(
        True, description="`slimllm`: weigh output directions by their variance (equations 5 to 7); else all alike."
    )


class Allocation(_Part):
    """How the ratio is spread over layers and rounds."""

    kind: Allocator | None = Field(None, description="Unset: the method's own.")
    alpha: float | None = Field(
        None,
        ge=0,
        le=100,
        description="`cosine`: α of SlimLLM's equation 11; unset: 10 up to a ratio of 0.2, 7 from 0.5 on, linear in between.",
    )
    schedule: Literal["geometric", "cubic"] = Field(
        "geometric", description="Ratio by round: equal steps of what is left, or cubic (large steps first)."
    )
    width_multiple: int | None = Field(
        None,
        ge=1,
        le=1024,
        description="Feed-forward widths are multiples of this; unset: 256 where the model is at least 4096 wide there, else 32.",
    )


class Recovery(_Part):
    """What is done to win back what pruning lost. Settings of a kind that was not asked for are ignored."""

    kind: RecoveryKind | None = Field(
        None,
        description="Unset: the method's own. `bias`, `linear-regression` and `least-squares` mend each layer as it is cut, from statistics; `lora` and `distill` train after the last round, on top of the method's own mending.",
    )
    damping: float | None = Field(
        None,
        gt=0,
        le=100,
        description="`least-squares`: pull towards the original weights, as a share of the mean diagonal of the Gram matrix; unset: the method's own (0.3, `sparsegpt` 0.01, `secateur-gradient` 10).",
    )
    target: Literal["model", "layer"] | None = Field(
        None,
        description="`least-squares`: fit each layer to what left it in the unpruned `model`, or to what the `layer` itself would give uncut; unset: the method's own (`model`; `sparsegpt` and `secateur-gradient` `layer`).",
    )
    epochs: float = Field(2.0, gt=0, le=100, description="`lora`, `distill`: passes over the calibration windows.")
    learning_rate: float = Field(1e-4, gt=0, le=1, description="`lora`, `distill`: peak of AdamW's.")
    batch_size: int = Field(64, ge=1, le=4096, description="`lora`, `distill`: windows of one step.")
    rank: int = Field(8, ge=1, le=1024, description="`lora`: rank of the adapters, which are merged afterwards.")
    temperature: float = Field(1.0, gt=0, le=100, description="`distill`: of both models' softmax.")


class Dynamic(_Part):
    """How a model of method `dsgp` chooses the units that write, for each prompt; other methods ignore it. The published
    `config.json` has it as `dynamic_pruning`, where it can be changed."""

    prior_weight: float | None = Field(
        None,
        ge=0,
        le=1,
        description="From 0, the prompt alone decides, to 1, the calibration text alone; unset: what loses least on the calibration text.",
    )
    per_sequence: bool = Field(
        False,
        description="Each sequence of a batch has units of its own, which takes their weights as often; else all share those that they need together.",
    )
    refresh_tokens: int | None = Field(
        None, ge=1, description="After so many written tokens the whole text so far is read anew; unset: never."
    )


class Target(_Part):
    """How large the pruned model is to be; one of the two.

    Met to within half a block of channels, and the biases that a recovery may add.
    """

    parameters: float | None = Field(None, gt=0, allow_inf_nan=False, description="All of its parameters.")
    bytes: float | None = Field(
        None, gt=0, allow_inf_nan=False, description="Bytes of its weights, in the dtype asked for."
    )

    @model_validator(mode="after")
    def _one_size(self) -> Self:
        if (self.parameters is None) == (self.bytes is None):
            raise ValueError("give either 'parameters' or 'bytes'")
        return self


def target_folder(ratio: float) -> str:
    """The folder of one target's files, where a list of ratios was asked for."""
    return f"ratio-{ratio:g}"


Ratio = Annotated[float, Field(gt=0, le=MAX_RATIO, allow_inf_nan=False, strict=True)]
Ratios = Annotated[list[Ratio], Field(min_length=1, max_length=MAX_TARGETS)]
_ONE_RATIO: TypeAdapter[float] = TypeAdapter(Ratio)
_RATIOS: TypeAdapter[list[float]] = TypeAdapter(Ratios)


def _mend(kind: RecoveryKind | None, method: Method) -> RecoveryKind:
    """Training goes on top of the method's own mending."""
    return method.recovery if kind is None or kind in TRAINED else kind


class PruningSpec(_Part):
    """How to prune: `target_ratio`, `method` and `rounds` say it; the rest has defaults that suit the method."""

    target_ratio: Ratio | Ratios | None = Field(
        None,
        description="Share of the parameters in the decoder blocks' attention and feed-forward weights to remove; a list makes one pruned model for each, and what is known of the source is found out once.",
        examples=[0.2],
    )
    target: Target | None = Field(
        None, validate_default=True, description="Instead of `target_ratio`: how large the result is to be."
    )
    method: str = Field(
        description="A name of `GET /v1/methods`.", examples=["piem-lsps"], json_schema_extra={"enum": list(METHODS)}
    )
    rounds: int | None = Field(
        None, strict=True, ge=1, le=64, description="Pruning rounds; unset: the method's default.", examples=[3]
    )
    seed: int = Field(0, ge=0, lt=2**31)
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto", description="Of computing and of the published weights; auto: the source's own."
    )
    calibration: Calibration = Calibration()
    evaluation: Evaluation = Evaluation()
    scoring: Scoring = Scoring()
    allocation: Allocation = Field(Allocation(), validate_default=True)
    recovery: Recovery = Field(Recovery(), validate_default=True)
    dynamic: Dynamic = Dynamic()
    layout: Layout = Field(
        "per-layer",
        validate_default=True,
        description="Of the published model. `per-layer`: every layer has the widths that suit it, and the repository a small modeling file. `uniform`: all layers give the same, so that the stock class loads it without code. `padded`: as `per-layer`, then filled up with zeros to the widest layer: exact, also without code, but larger.",
    )

    formats: list[Format] = Field(
        ["safetensors"],
        min_length=1,
        description="Of the published weights: `safetensors` always, and `gguf` for llama.cpp beside it where it can run the model.",
        examples=[["safetensors", "gguf"]],
    )
    gguf_quantization: GgufKind = Field("F16", description="Of the GGUF file's weights.")

    @field_validator("formats")
    @classmethod
    def _with_safetensors(cls, formats: list[Format]) -> list[Format]:
        if "safetensors" not in formats or len(set(formats)) < len(formats):
            raise ValueError("allowed: ['safetensors'] or ['safetensors', 'gguf']")
        return formats

    @field_validator("method")
    @classmethod
    def _known_method(cls, name: str, info: ValidationInfo) -> str:
        if name not in METHODS:
            raise ValueError(f"no method '{name}'; allowed: {', '.join(METHODS)}")
        if METHODS[name].dynamic and info.data.get("target") is not None:
            raise ValueError(
                f"'{name}' leaves the model its size: give 'target_ratio', the share of work that writing saves"
            )
        return name

    @field_validator("rounds", "scoring", "allocation", "recovery", "layout", "formats")
    @classmethod
    def _nothing_is_cut(cls, value: Any, info: ValidationInfo) -> Any:
        """A dynamic method has one round, parts of its own, and one form."""
        method = info.data.get("method")
        if method is None or not METHODS[method].dynamic:
            return value
        allowed = {
            "rounds": value in (None, 1) or "1",
            "scoring": getattr(value, "kind", None) is None or "no kind",
            "allocation": getattr(value, "kind", None) is None or "no kind",
            "recovery": getattr(value, "kind", None) in (None, "none") or "kind 'none'",
            "layout": value == "per-layer" or "'per-layer'",
            "formats": value == ["safetensors"] or "['safetensors']",
        }[str(info.field_name)]
        if allowed is not True:
            raise ValueError(f"'{method}' cuts nothing before it has a prompt; allowed: {allowed}")
        return value

    @field_validator("target_ratio", mode="before")
    @classmethod
    def _one_or_several(cls, value: Any) -> Any:
        """Checked as what it looks like: a union would tell what is wrong with it as either."""
        if value is None:
            return None
        return _RATIOS.validate_python(value) if isinstance(value, list) else _ONE_RATIO.validate_python(value)

    @field_validator("target_ratio")
    @classmethod
    def _ascending(cls, ratios: float | list[float] | None) -> float | list[float] | None:
        if isinstance(ratios, list):
            names = {f"{ratio:g}" for ratio in ratios}  # what folders and repositories are called by
            if ratios != sorted(ratios) or len(names) < len(ratios):
                raise ValueError("the ratios must ascend, and differ within six digits")
        return ratios

    @field_validator("target")
    @classmethod
    def _one_target(cls, target: Target | None, info: ValidationInfo) -> Target | None:
        if "target_ratio" in info.data and (info.data["target_ratio"] is None) == (target is None):
            raise ValueError("give either 'target_ratio' or 'target'")
        return target

    @field_validator("allocation")
    @classmethod
    def _scores_to_rank(cls, allocation: Allocation, info: ValidationInfo) -> Allocation:
        if {"method", "scoring"} <= info.data.keys():  # or they are at fault themselves
            method = METHODS[info.data["method"]]
            scorer, allocator = info.data["scoring"].kind or method.scoring, allocation.kind or method.allocation
            if not method.dynamic and scorer in LAYERWISE_SCORERS and allocator in RANKING_ALLOCATORS:
                allowed = ", ".join(kind for kind in get_args(Allocator) if kind not in RANKING_ALLOCATORS)
                raise ValueError(
                    f"'{allocator}' needs scores of the whole model, '{scorer}' has none; allowed: {allowed}"
                )
        return allocation

    @field_validator("layout")
    @classmethod
    def _fits_stock_class(cls, layout: Layout, info: ValidationInfo) -> Layout:
        if layout != "per-layer" and {"method", "allocation", "recovery"} <= info.data.keys():
            mend = _mend(info.data["recovery"].kind, METHODS[info.data["method"]])
            if mend in BIASING:
                raise ValueError(
                    f"'{layout}' has no place for the biases that recovery '{mend}' adds; allowed: 'per-layer', or "
                    "recovery 'none' or 'least-squares'"
                )
            if layout == "uniform" and info.data["allocation"].kind not in (None, "uniform"):
                raise ValueError("'uniform' layers give the same: leave allocation.kind out, or use another layout")
        return layout

    def ratios(self, shape: ModelShape, source_dtype: str) -> tuple[float, ...]:
        """The ratios to reach on a model of this shape, ascending; ``source_dtype`` is what ``auto`` stands for.

        Raises:
            PruningError: ``target_unreachable`` when ``target`` asks for no less than the model has, or too little;
                ``ratio_unreachable`` when whole units do not come near enough to it or to a ratio.
        """
        field = "target_ratio" if self.target is None else "target"
        ratios = tuple(
            self._ratio_of_target(shape, source_dtype) if ratio is None else ratio for ratio in self.asked_ratios
        )
        for ratio in ratios:
            shape.check_ratio(ratio, self.allocation.width_multiple, self.uniform, field=field)
        return ratios

    def check_fits(self, shape: ModelShape, config: Mapping[str, Any]) -> None:
        """Refuse what cannot be done with a model of this shape and config.

        Raises:
            PruningError: ``recovery_unsupported``, ``method_unsupported``, ``gguf_unsupported``, naming what would do.
        """
        if shape.family.experts and self.mend in BIASING:
            raise PruningError(
                "recovery_unsupported",
                f"Experts have no place for the biases that '{self.mend}', the recovery of method '{self.method}' or the one "
                "asked for, adds; allowed: recovery.kind 'least-squares' or 'none'.",
                field="recovery.kind",
            )
        if self.is_dynamic and (shape.family.experts or shape.family.two_positions):
            raise PruningError(
                "method_unsupported",
                f"Method '{self.method}' does not know mixtures of experts and the first ChatGLM-6B; allowed: "
                f"{', '.join(STATIC_METHODS)}.",
                field="method",
            )
        if "gguf" in self.formats:
            obstacle = gguf_obstacle(
                shape,
                config,
                self.gguf_quantization,
                uniform=self.layout != "per-layer",
                added_biases=self.mend in BIASING,
                width_multiple=self.allocation.width_multiple,
            )
            if obstacle is not None:
                raise obstacle

    def _ratio_of_target(self, shape: ModelShape, source_dtype: str) -> float:
        target = self.target
        assert target is not None  # or validation would have failed
        size = DTYPE_BYTES[source_dtype if self.dtype == "auto" else self.dtype]
        wanted = target.parameters or (target.bytes or 0) / size
        ratio = (shape.parameters - wanted) / shape.prunable_parameters
        if not 0 < ratio <= MAX_RATIO:
            smallest = shape.parameters - MAX_RATIO * shape.prunable_parameters
            raise PruningError(
                "target_unreachable",
                f"The target is {wanted:,.0f} parameters; this model has {shape.parameters:,} and can be pruned to "
                f"{smallest:,.0f}.",
                field="target",
            )
        return ratio

    @classmethod
    def of_request(cls, request: dict[str, Any]) -> Self:
        """The part of a stored job request that says how to prune."""
        return cls.model_validate({name: request[name] for name in cls.model_fields if name in request})

    @property
    def several(self) -> bool:
        """Whether a list of ratios was asked for, even of one: reports, folders and repositories are then by target."""
        return isinstance(self.target_ratio, list)

    @property
    def asked_ratios(self) -> tuple[float | None, ...]:
        """One for each target; ``None``: a size was asked for."""
        return tuple(self.target_ratio) if isinstance(self.target_ratio, list) else (self.target_ratio,)

    @property
    def target_count(self) -> int:
        """How many pruned models are asked for."""
        return len(self.asked_ratios)

    @property
    def parts(self) -> dict[str, str]:
        """Scorer, allocator and recovery that the pruning is made with, by the part of the request they belong to."""
        steps = [step for step in (self.mend, self.training) if step not in ("none", None)]
        return {"scoring": self.scorer, "allocation": self.allocator, "recovery": " and ".join(steps) or "none"}

    @property
    def is_dynamic(self) -> bool:
        """Whether the published model chooses its units itself."""
        return METHODS[self.method].dynamic

    @property
    def scorer(self) -> Scorer:
        return self.scoring.kind or METHODS[self.method].scoring

    @property
    def allocator(self) -> Allocator:
        if self.uniform:
            return "uniform"
        return self.allocation.kind or METHODS[self.method].allocation

    @property
    def uniform(self) -> bool:
        """Whether all layers are to have the same widths."""
        return self.layout == "uniform"

    @property
    def mend(self) -> RecoveryKind:
        """What mends each layer as it is cut: ``none``, or a name in ``secateur.engine.recovery.LAYERWISE_RECOVERIES``."""
        return _mend(self.recovery.kind, METHODS[self.method])

    @property
    def training(self) -> Literal["lora", "distill"] | None:
        """What trains the whole when all is cut."""
        return self.recovery.kind if self.recovery.kind == "lora" or self.recovery.kind == "distill" else None

    @property
    def refit_target(self) -> Literal["model", "layer"]:
        return self.recovery.target or METHODS[self.method].refit_target

    @property
    def refit_damping(self) -> float:
        return self.recovery.damping or METHODS[self.method].refit_damping

    @property
    def needs_reference(self) -> bool:
        """Whether layers are mended towards the unpruned model."""
        return self.mend == "least-squares" and self.refit_target == "model"

    def published(self) -> dict[str, Any]:
        """The spec as reports and model cards show it, see :func:`without_texts`."""
        return without_texts(self.model_dump(mode="json"))

    @property
    def round_count(self) -> int:
        """Rounds of pruning for one target: ``rounds``, or the method's default."""
        return self.rounds or METHODS[self.method].default_rounds

    @property
    def rounds_per_target(self) -> int:
        """Rounds of pruning, and the one of training where a recovery trains."""
        return self.round_count + (self.training is not None)

    @property
    def total_rounds(self) -> int:
        """Of all targets."""
        return self.target_count * self.rounds_per_target
