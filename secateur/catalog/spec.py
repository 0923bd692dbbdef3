"""The pruning spec: the part of a job request that says how to prune. Every instance of it is valid."""

from typing import Annotated, Any, Literal, Self

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    TypeAdapter,
    ValidationInfo,
    WithJsonSchema,
    field_validator,
    model_validator,
)
from pydantic_core import PydanticCustomError

from secateur.catalog.gguf import GgufKind
from secateur.catalog.methods import (
    ALLOCATORS,
    LAYERWISE_RECOVERIES,
    METHODS,
    NO_RECOVERY,
    SCORERS,
    AllocatorName,
    FitTo,
    LayerwiseRecoveryName,
    MethodName,
    Scorer,
    ScorerName,
    StructureName,
    TrainingName,
)
from secateur.catalog.sources import UPLOAD_PREFIX
from secateur.catalog.structures import STRUCTURES, WHOLE, WIDTHS
from secateur.contract.jobs import without_texts

MAX_RATIO = 0.9
MAX_TARGETS = 8
DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}

Layout = Literal["per-layer", "uniform", "padded"]
Format = Literal["safetensors", "gguf"]
LatencyProtocol = Annotated[
    Literal[True, False, "slimllm"],
    WithJsonSchema({"anyOf": [{"type": "boolean"}, {"type": "string", "const": "slimllm"}]}),
]
"""Whether and how latency is measured. Generators of clients read no enumeration of values of several types."""

ZERO_SHOT = {
    "boolq": "super_glue/boolq/default.yaml",
    "piqa": "piqa/piqa.yaml",
    "hellaswag": "hellaswag/hellaswag.yaml",
    "winogrande": "winogrande/default.yaml",
    "arc_easy": "arc/arc_easy.yaml",
    "arc_challenge": "arc/arc_challenge.yaml",
    "openbookqa": "openbookqa/openbookqa.yaml",
}
"""The zero-shot tasks of the papers, with the path of each task in ``lm_eval``."""

LONGEST_TEXT = 1_000_000
"""Largest number of characters of one text of a request."""
NO_NUL = r"^[^\x00]*$"


def _without_nul(text: str) -> str:
    # A pattern would be matched against all texts of a request in one piece, which holds the interpreter's lock for long.
    if "\0" in text:
        raise PydanticCustomError(
            "string_pattern_mismatch", "a text with a NUL character does not match the pattern", {"pattern": NO_NUL}
        )
    return text


Text = Annotated[
    str,
    Field(min_length=1, max_length=LONGEST_TEXT, json_schema_extra={"pattern": NO_NUL}),
    AfterValidator(_without_nul),
]
"""A text without NUL characters, which Postgres cannot store."""
DatasetName = Annotated[str, Field(max_length=255, pattern=r"^[^\x00]+$")]
TaskName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,95}$")]
Prompt = Annotated[str, Field(min_length=1, max_length=4000, pattern=r"^[^\x00]*$")]


class _Settings(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class TextSource(_Settings):
    """The source of a text: a named data set, a file, or the texts themselves.

    If neither `dataset` nor `texts` is set, the text is sampled from the model.
    """

    dataset: DatasetName | None = Field(
        None,
        description="`wikitext2`, `ptb`, `c4`, a Hub data set id (`org/name`, optionally `:config`), `local:NAME`, a UTF-8 text file in the texts folder, or `upload:ID`, a data set that was uploaded to the service.",
        examples=["wikitext2"],
    )
    texts: list[Text] | None = Field(
        None,
        min_length=1,
        max_length=10_000,
        fail_fast=True,
        description="The texts themselves, as far as they fit into the largest request that the service takes (64 MiB, unless its operator says otherwise).",
    )
    samples: int = Field(32, ge=1, le=65_536, description="Windows of `sequence_length` tokens, at most.")
    sequence_length: int = Field(256, ge=8, le=8192, description="Tokens a window; capped at what the model takes.")

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        if self.dataset is not None and self.texts is not None:
            raise ValueError("give either 'dataset' or 'texts', not both")
        size = None if self.texts is None else sum(len(text.encode()) for text in self.texts)
        if size is not None and size < self.sequence_length:  # every token has at least one byte
            raise ValueError(f"the texts have {size} bytes, too short for one window of {self.sequence_length} tokens")
        return self


class Calibration(TextSource):
    """The text that scores are computed on.

    If neither `dataset` nor `texts` is set, the text is sampled from the model.
    """


class Evaluation(TextSource):
    """The held-out text that perplexity is measured on.

    If neither `dataset` nor `texts` is set, the last fifth of the calibration text is held out, and the model is not
    calibrated on that part. If there is no calibration text or too little of it, the evaluation text is sampled from
    the model.
    """

    latency: LatencyProtocol = Field(
        True,
        description="Measure prefill and decode time and peak memory, before and after; `slimllm`: as the SlimLLM paper's table 3 does, decoding 256 tokens at batch 8, in 20 repeats.",
    )
    perplexity: list[DatasetName] = Field(
        [],
        max_length=8,
        description="Also on these texts, whole: `wikitext2`, `ptb`, `c4`, a Hub data set, `local:NAME` or `upload:ID`.",
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
        None,
        max_length=8,
        description="Prompts that both models continue, for the report. Unset: three built-in prompts.",
    )

    @field_validator("perplexity", "zero_shot")
    @classmethod
    def _once(cls, names: list[str]) -> list[str]:
        if len(set(names)) < len(names):
            raise ValueError("a name occurs twice")
        return names


class VocabularySettings(_Settings):
    """The settings by which tokens that a kind of text does not need leave the tokenizer and the model.

    Every text can still be encoded, and is decoded to itself. If neither `dataset` nor `texts` is set, the tokens are
    chosen by the calibration text, without the part of it that is held out for evaluation.
    """

    max_growth: float = Field(
        0.01,
        ge=0,
        le=1,
        allow_inf_nan=False,
        description="The largest share by which texts of this kind may take more tokens than before, as measured on parts of the text that had no say in the choice.",
    )
    multiple: int = Field(64, ge=1, le=4096, description="The number of tokens that stay is a multiple of this number.")
    dataset: DatasetName | None = Field(None, description="As in `calibration`.", examples=["wikitext2"])
    texts: list[Text] | None = Field(
        None, min_length=1, max_length=10_000, fail_fast=True, description="As in `calibration`."
    )

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        if self.dataset is not None and self.texts is not None:
            raise ValueError("give either 'dataset' or 'texts', not both")
        return self


class Scoring(_Settings):
    """The settings of scoring: how units are scored. Coefficients of a scorer that is not used are ignored."""

    kind: ScorerName | None = Field(None, description="Unset: the method's own.")
    lambda_weight: float = Field(0.1, ge=0, le=100, description="`piem`: λ1, the weight of the L1 norm.")
    lambda_loss: float = Field(1.0, ge=0, le=100, description="`piem`: λ2, the weight of the loss change.")
    gamma: float = Field(0.5, ge=0, le=100, description="`piem`: γ, the weight of the gradient term.")
    shielding: Literal["auto", "exact", "estimate"] = Field(
        "auto",
        description="`piem`: how the loss change ΔL of a KV group is found: `exact` sets the group to zero in a forward pass, `estimate` takes it from the gate's gradient, `auto` is exact where that is affordable.",
    )
    greedy_swaps: bool = Field(True, description="`slimllm`: refine the choice of KV groups by Algorithm 1.")
    feature_space: bool = Field(
        True,
        description="`slimllm`: weight output directions by their variance (equations 5 to 7); false: all alike.",
    )


class Allocation(_Settings):
    """The settings of allocation: how the ratio is spread over layers and rounds."""

    kind: AllocatorName | None = Field(None, description="Unset: the method's own.")
    alpha: float | None = Field(
        None,
        ge=0,
        le=100,
        description="`cosine`: α of SlimLLM's equation 11. Unset: 10 up to a ratio of 0.2, 7 from 0.5 on, linear in between.",
    )
    schedule: Literal["geometric", "cubic"] = Field(
        "geometric",
        description="Ratio after each round: `geometric` removes the same share of what is left, `cubic` takes large steps first.",
    )
    width_multiple: int | None = Field(
        None,
        ge=1,
        le=1024,
        description="Feed-forward widths are multiples of this number. Unset: 256 where the model is at least 4096 wide there, else 32.",
    )


class LayerwiseSettings(_Settings):
    """The settings of the layer-wise recovery, which corrects each layer as it is cut.

    The correction is computed from statistics of the calibration text.
    """

    kind: LayerwiseRecoveryName | None = Field(None, description="Unset: the method's own; `none`: no correction.")
    damping: float | None = Field(
        None,
        gt=0,
        le=100,
        description="`least-squares`: weight of the distance to the original weights, as a share of the mean diagonal of the Gram matrix. Unset: the method's own (0.3; `sparsegpt` 0.01; `secateur-gradient` 10).",
    )
    fit_to: FitTo | None = Field(
        None,
        description="`least-squares`: fit each layer to the hidden states of the unpruned `model`, or to the output that the `layer` itself would have if it were not cut. Unset: the method's own (`model`; `sparsegpt` and `secateur-gradient`: `layer`).",
    )


class TrainingSettings(_Settings):
    """The settings of the training of the pruned model after the last round."""

    kind: TrainingName = Field(
        description="`lora`: low-rank adapters on the next-token loss, merged afterwards. `distill`: all weights of the blocks, on the distance to the unpruned model's predictions.",
    )
    epochs: float = Field(2.0, gt=0, le=100, description="Passes over the calibration windows.")
    learning_rate: float = Field(1e-4, gt=0, le=1, description="Peak learning rate of AdamW.")
    batch_size: int = Field(64, ge=1, le=4096, description="Windows of one optimizer step.")
    rank: int = Field(8, ge=1, le=1024, description="`lora`: rank of the adapters.")
    temperature: float = Field(1.0, gt=0, le=100, description="`distill`: temperature of both models' softmax.")


class Recovery(_Settings):
    """The settings of recovery, which reduces the loss that pruning causes: layer by layer, by training, or both."""

    layerwise: LayerwiseSettings = LayerwiseSettings()
    training: TrainingSettings | None = Field(None, description="Unset: no training.")


class Dynamic(_Settings):
    """The settings by which a model of method `dsgp` chooses the units that generate, for each prompt.

    Other methods ignore these settings. The published `config.json` contains the settings as `dynamic_pruning`, where
    they can be changed.
    """

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


class Goal(_Settings):
    """The goal: the size of the pruned model, instead of a ratio. Exactly one of the fields is set.

    The size of the pruned model differs from the goal by at most half a block of channels and the biases that a
    recovery may add.
    """

    parameters: float | None = Field(
        None, gt=0, allow_inf_nan=False, description="Number of parameters of the whole model."
    )
    bytes: float | None = Field(
        None, gt=0, allow_inf_nan=False, description="Bytes of the weights, in the requested dtype."
    )

    @model_validator(mode="after")
    def _one_size(self) -> Self:
        if (self.parameters is None) == (self.bytes is None):
            raise ValueError("give either 'parameters' or 'bytes'")
        return self


def target_folder(ratio: float) -> str:
    """Return the name of the folder with the files of one target ratio, for a request with a list of ratios."""
    return f"ratio-{ratio:g}"


Share = Annotated[float, Field(gt=0, le=MAX_RATIO, allow_inf_nan=False)]
Ratio = Annotated[float, Field(gt=0, le=MAX_RATIO, allow_inf_nan=False, strict=True)]
Ratios = Annotated[list[Ratio], Field(min_length=1, max_length=MAX_TARGETS)]
_ONE_RATIO: TypeAdapter[float] = TypeAdapter(Ratio)
_RATIOS: TypeAdapter[list[float]] = TypeAdapter(Ratios)


class PruningSpec(_Settings):
    """The settings that say how to prune.

    `method` and one of `target_ratio`, `goal` and `vocabulary` are required; the other fields have defaults that suit
    the method. With `vocabulary` alone, nothing is removed but tokens.
    :mod:`secateur.catalog.methods` lists what a method, a scorer or a recovery needs and excludes;
    :func:`secateur.catalog.resolve.resolve` resolves the request on a model.
    """

    target_ratio: Ratio | Ratios | None = Field(
        None,
        description="Share of the parameters in the decoder blocks' attention and feed-forward weights to remove; embeddings do not count. A list makes one pruned model for each ratio, and statistics of the source are computed once.",
        examples=[0.2],
    )
    vocabulary: VocabularySettings | None = Field(
        None,
        description="Remove tokens that the texts do not need from the tokenizer, the embedding and the head. This never counts towards `target_ratio`, which may be left out then. Unset: all tokens stay.",
        examples=[{"dataset": "wikitext2", "max_growth": 0.01}],
    )
    goal: Goal | None = Field(
        None,
        validate_default=True,
        description="Instead of `target_ratio`: the size of the pruned model. With `vocabulary`, the tokens leave first, and units make up the rest.",
    )
    method: MethodName = Field(description="A name of `GET /v1/methods`.", examples=["piem-lsps"])
    rounds: int | None = Field(
        None, strict=True, ge=1, le=64, description="Pruning rounds. Unset: the method's default.", examples=[3]
    )
    seed: int = Field(0, ge=0, lt=2**31)
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto", description="Dtype of the computation and of the published weights. `auto`: the source's own."
    )
    calibration: Calibration = Field(Calibration(), validate_default=True)
    evaluation: Evaluation = Evaluation()
    scoring: Scoring = Scoring()
    allocation: Allocation = Field(Allocation(), validate_default=True)
    recovery: Recovery = Field(Recovery(), validate_default=True)
    structures: list[StructureName] | None = Field(
        None,
        validate_default=True,
        min_length=1,
        max_length=len(STRUCTURES),
        description="The kinds of units that are removed. Unset: what the method cuts, in most methods `kv_groups` and `channels`, which share the ratio evenly. `layers`, `attention`, `feed_forward` and `experts` are removed whole, before the widths are cut.",
        examples=[["layers"], ["kv_groups", "channels"]],
    )
    shares: dict[StructureName, Share] = Field(
        {},
        validate_default=True,
        max_length=len(STRUCTURES),
        description="The part of the ratio that each of `layers`, `attention`, `feed_forward` and `experts` gives, as a share of the same parameters as `target_ratio`; `kv_groups` and `channels` give the rest. Unset: structures compete, and the split with the lowest measured loss is taken.",
        examples=[{"layers": 0.1}],
    )
    dynamic: Dynamic = Dynamic()
    layout: Layout = Field(
        "per-layer",
        validate_default=True,
        description="Layout of the published model. `per-layer`: every layer has its own widths, and the repository contains a small modeling file unless all layers are alike. `uniform`: all layers have the same widths, so that the stock class loads the model without code. `padded`: as `per-layer`, then filled up with zeros to the widest layer: the same output, also without code, but larger files.",
    )

    formats: list[Format] = Field(
        ["safetensors"],
        min_length=1,
        max_length=2,
        description="Formats of the published weights: `safetensors` always, and `gguf` for llama.cpp where it can run the model.",
        examples=[["safetensors", "gguf"]],
    )
    gguf_quantization: GgufKind = Field("F16", description="Quantisation of the GGUF file's weights.")

    @field_validator("formats")
    @classmethod
    def _with_safetensors(cls, formats: list[Format]) -> list[Format]:
        if "safetensors" not in formats or len(set(formats)) < len(formats):
            raise ValueError("allowed: ['safetensors'] or ['safetensors', 'gguf']")
        return formats

    @field_validator("method")
    @classmethod
    def _keeps_the_size(cls, name: str, info: ValidationInfo) -> str:
        if METHODS[name].dynamic and info.data.get("goal") is not None:
            raise ValueError(
                f"'{name}' does not change the model's size: give 'target_ratio', the share of the work that generating saves"
            )
        if METHODS[name].dynamic and info.data.get("vocabulary") is not None:
            raise ValueError(f"'{name}' cuts nothing, so it cannot be combined with 'vocabulary'")
        return name

    @field_validator("rounds", "scoring", "allocation", "recovery", "layout", "formats")
    @classmethod
    def _nothing_is_cut(cls, value: Any, info: ValidationInfo) -> Any:
        """Check that a request for a dynamic method has one round, no other components, one layout and one format."""
        method = info.data.get("method")
        if method is None or not METHODS[method].dynamic:
            return value
        allowed = {
            "rounds": value in (None, 1) or "1",
            "scoring": getattr(value, "kind", None) is None or "no kind",
            "allocation": getattr(value, "kind", None) is None or "no kind",
            "recovery": not isinstance(value, Recovery)
            or (value.layerwise.kind in (None, NO_RECOVERY) and value.training is None)
            or "layerwise.kind 'none' and no training",
            "layout": value == "per-layer" or "'per-layer'",
            "formats": value == ["safetensors"] or "['safetensors']",
        }[str(info.field_name)]
        if allowed is not True:
            raise ValueError(f"'{method}' cuts nothing before it has a prompt; allowed: {allowed}")
        return value

    @field_validator("target_ratio", mode="before")
    @classmethod
    def _one_or_several(cls, value: Any) -> Any:
        """Validate a list as ratios and any other value as one ratio; a union would report the errors of both types."""
        if value is None:
            return None
        return _RATIOS.validate_python(value) if isinstance(value, list) else _ONE_RATIO.validate_python(value)

    @field_validator("target_ratio")
    @classmethod
    def _ascending(cls, ratios: float | list[float] | None) -> float | list[float] | None:
        if isinstance(ratios, list):
            names = {f"{ratio:g}" for ratio in ratios}  # these names are parts of folder and repository names
            if ratios != sorted(ratios) or len(names) < len(ratios):
                raise ValueError("the ratios must ascend, and differ within six digits")
        return ratios

    @field_validator("goal")
    @classmethod
    def _ratio_or_goal(cls, goal: Goal | None, info: ValidationInfo) -> Goal | None:
        if not {"target_ratio", "vocabulary"} <= info.data.keys():  # such a field has an error of its own
            return goal
        ratio, vocabulary = info.data["target_ratio"], info.data["vocabulary"]
        if (ratio is None) == (goal is None) and not (ratio is None and vocabulary is not None):
            raise ValueError("give either 'target_ratio' or 'goal'")
        return goal

    @field_validator("rounds")
    @classmethod
    def _rounds_of_pruning(cls, rounds: int | None, info: ValidationInfo) -> int | None:
        named = {"target_ratio", "goal"} <= info.data.keys()
        if named and info.data["target_ratio"] is None and info.data["goal"] is None and rounds not in (None, 1):
            raise ValueError("without 'target_ratio' or 'goal', there is nothing to prune in rounds; allowed: 1")
        return rounds

    @field_validator("calibration")
    @classmethod
    def _text_to_choose_tokens_by(cls, calibration: Calibration, info: ValidationInfo) -> Calibration:
        vocabulary = info.data.get("vocabulary")
        if vocabulary is not None and not any(source.dataset or source.texts for source in (vocabulary, calibration)):
            raise ValueError(
                "'vocabulary' chooses tokens by a text, and none is named: give 'texts' or 'dataset' here or in 'vocabulary'"
            )
        return calibration

    @field_validator("allocation")
    @classmethod
    def _scores_to_rank(cls, allocation: Allocation, info: ValidationInfo) -> Allocation:
        if {"method", "scoring"} <= info.data.keys():  # a field that is missing here has an error of its own
            method = METHODS[info.data["method"]]
            scorer = SCORERS[info.data["scoring"].kind or method.scorer]
            allocator = ALLOCATORS[allocation.kind or method.allocator]
            if not method.dynamic and scorer.layerwise and allocator.ranks:
                allowed = ", ".join(name for name, entry in ALLOCATORS.items() if not entry.ranks)
                raise ValueError(
                    f"'{allocator.name}' needs scores of the whole model, '{scorer.name}' has none; allowed: {allowed}"
                )
        return allocation

    @field_validator("structures")
    @classmethod
    def _can_be_scored(cls, structures: list[str] | None, info: ValidationInfo) -> list[str] | None:
        """Check that the structures differ, and that the method scores all of them."""
        if not {"method", "scoring"} <= info.data.keys():  # a field that is missing here has an error of its own
            return structures
        method, scoring = info.data["method"], info.data["scoring"]
        asked = METHODS[method].structures if structures is None else structures
        if len(set(asked)) < len(asked):
            raise ValueError("each structure may be named once")
        if METHODS[method].dynamic and structures is not None and {*structures} != {*WIDTHS}:
            raise ValueError(f"'{method}' chooses among {' and '.join(WIDTHS)} alone")
        for structure in asked:
            if scorer_of(structure, method, scoring.kind) is None:
                scored = [name for name in STRUCTURES if scorer_of(name, method, scoring.kind) is not None]
                raise ValueError(
                    f"'{method}' has no scores of '{structure}'; allowed: {', '.join(scored)}, or a 'scoring.kind' among "
                    f"{', '.join(name for name, entry in SCORERS.items() if structure in entry.structures)}"
                )
        return structures

    @field_validator("shares")
    @classmethod
    def _shares_add_up(cls, shares: dict[str, float], info: ValidationInfo) -> dict[str, float]:
        """Check that either every structure that is removed whole has a share, or none has."""
        if not {"method", "structures", "target_ratio"} <= info.data.keys():
            return shares
        asked = info.data["structures"] or METHODS[info.data["method"]].structures
        whole = [name for name in asked if name in WHOLE]
        if strange := [name for name in shares if name not in whole]:
            raise ValueError(f"'{strange[0]}' has no share; allowed: {', '.join(whole) or 'no shares'}")
        if not shares:
            return shares
        if info.data.get("goal") is not None and info.data.get("vocabulary") is not None:
            raise ValueError(
                "shares are parts of a ratio, which is not known before the tokens leave; allowed: no shares"
            )
        if missing := [name for name in whole if name not in shares]:
            raise ValueError(f"'{missing[0]}' needs a share too, or no structure may have one")
        ratios = info.data["target_ratio"]
        smallest = min(ratios) if isinstance(ratios, list) else ratios
        together = sum(shares.values())
        if smallest is not None and together > smallest + 1e-9:
            raise ValueError(f"the shares add up to {together:g}, which is more than the ratio {smallest:g}")
        return shares

    @field_validator("layout")
    @classmethod
    def _fits_stock_class(cls, layout: Layout, info: ValidationInfo) -> Layout:
        if layout != "per-layer" and {"method", "allocation", "recovery"} <= info.data.keys():
            name = info.data["recovery"].layerwise.kind or METHODS[info.data["method"]].layerwise_recovery
            if LAYERWISE_RECOVERIES[name].adds_bias:
                raise ValueError(
                    f"'{layout}' has no place for the biases that recovery '{name}' adds; allowed: 'per-layer', or "
                    f"recovery.layerwise.kind {_without_bias()}"
                )
            differing = [
                name for name in info.data.get("structures") or () if name in WHOLE and not STRUCTURES[name].alike
            ]
            if layout == "uniform" and differing:
                raise ValueError(
                    f"in 'uniform' all layers are alike, and some would be without their '{differing[0]}'; allowed: "
                    "'per-layer', 'padded'"
                )
            if layout == "uniform" and info.data["allocation"].kind not in (None, "uniform"):
                raise ValueError(
                    "'uniform' layers all have the same widths: leave allocation.kind out, or use another layout"
                )
        return layout

    @classmethod
    def of_request(cls, request: dict[str, Any]) -> Self:
        """Return the spec that a stored job request contains."""
        return cls.model_validate({name: request[name] for name in cls.model_fields if name in request})

    @property
    def several(self) -> bool:
        """Whether the request has a list of ratios, even a list of one ratio.

        Each ratio then has a report, a folder and a repository of its own.
        """
        return isinstance(self.target_ratio, list)

    @property
    def requested_ratios(self) -> tuple[float | None, ...]:
        """The ratio of each pruned model; ``None`` where the request has a goal, and 0 where it has neither."""
        if self.vocabulary_alone:
            return (0.0,)
        return tuple(self.target_ratio) if isinstance(self.target_ratio, list) else (self.target_ratio,)

    @property
    def vocabulary_alone(self) -> bool:
        """Whether tokens are all that the request removes."""
        return self.target_ratio is None and self.goal is None

    def uploads(self) -> dict[str, str]:
        """Return the ids of the uploaded data sets (``upload:ID``) that the request names, by the field that names each."""
        named = {"calibration.dataset": self.calibration.dataset, "evaluation.dataset": self.evaluation.dataset}
        if self.vocabulary is not None:
            named["vocabulary.dataset"] = self.vocabulary.dataset
        named |= {f"evaluation.perplexity.{index}": name for index, name in enumerate(self.evaluation.perplexity)}
        return {
            field: name.removeprefix(UPLOAD_PREFIX)
            for field, name in named.items()
            if name is not None and name.startswith(UPLOAD_PREFIX)
        }

    def published(self) -> dict[str, Any]:
        """Return the request as reports and model cards show it, with texts replaced by :func:`without_texts`."""
        return without_texts(self.model_dump(mode="json"))


def scorer_of(structure: str, method: str, kind: str | None) -> Scorer | None:
    """Return the scorer of a structure: ``kind`` if it scores the structure, or else one of the method's own."""
    if kind is not None and structure in SCORERS[kind].structures:
        return SCORERS[kind]
    own = METHODS[method].scorers.get(structure)
    return None if own is None else SCORERS[own]


def _without_bias() -> str:
    return " or ".join(f"'{name}'" for name, entry in LAYERWISE_RECOVERIES.items() if not entry.adds_bias)
