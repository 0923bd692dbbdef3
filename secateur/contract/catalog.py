"""The bodies of the responses of ``/v1/methods``, ``/v1/models``, ``/v1/texts``, ``/v1/tasks`` and ``/v1/models/inspect``."""

from typing import Any

from pydantic import BaseModel, Field

from secateur.contract.jobs import JobError


class MethodView(BaseModel):
    """A pruning method: its components, and what the components need of the model."""

    name: str
    summary: str
    paper: str
    equations: str = Field(description="Where the paper has the formulas.")
    scorer: str = Field(description="How units are scored.")
    allocator: str = Field(description="How the ratio is spread over the layers.")
    layerwise_recovery: str = Field(description="How each layer is corrected as it is cut.")
    default_rounds: int = Field(description="Pruning rounds of a request that does not say.")
    needs: list[str] = Field(description="What the components need of the model, such as `gates` or `moments`.")
    needs_gradients: bool
    dynamic: bool = Field(description="Nothing is cut: the published model chooses its units for each prompt.")
    structures: list[str] = Field(description="What it cuts, where a request names no `structures`.")
    scorers: dict[str, str] = Field(description="For each structure that a request can name, what scores its units.")
    passes: str = Field(description="What scoring costs in a round.")


class Kinds(BaseModel):
    """The kinds of scorer, allocator, layer-wise recovery and training that can replace the components of a method.

    A scorer scores the units of some structures, see `structures`. Of the scorers of `kv_groups` and `channels`, `lorap`,
    `obs`, `slimllm` and `wanda` compute no scores of the whole model, which the allocator `threshold` needs.
    """

    scorer: list[str] = Field(description="For `scoring.kind`.")
    allocator: list[str] = Field(description="For `allocation.kind`.")
    layerwise_recovery: list[str] = Field(description="For `recovery.layerwise.kind`.")
    training: list[str] = Field(description="For `recovery.training.kind`.")
    structures: dict[str, list[str]] = Field(description="For each structure, the scorers of its units.")


class MethodList(BaseModel):
    """All pruning methods by name, and the kinds of component that can replace those of a method."""

    items: list[MethodView]
    kinds: Kinds


class NameList(BaseModel):
    """Names, in the form in which a request names the things."""

    items: list[str]


class PrunedSize(BaseModel):
    """The size of the model after it is pruned by a target ratio."""

    target_ratio: float
    nearest_ratio: float = Field(description="The ratio that will be reached.")
    parameters: int
    bytes: int = Field(description="Of the weights, in the model's own dtype.")


class PossibleLayout(BaseModel):
    """The largest ratio and the GGUF quantisations that a layout of the published model allows."""

    layout: str
    max_ratio: float = Field(description="The largest ratio.")
    gguf: list[str] = Field(description="Quantisations in which a GGUF file can be made.")
    gguf_reason: str | None = Field(description="Why not in the others.")


class PossibleStructure(BaseModel):
    """What a kind of unit could give, alone, and where the result fits."""

    structure: str
    units: int = Field(description="The number of units, of all layers together.")
    parameters: int = Field(description="Parameters of all its units.")
    max_ratio: float | None = Field(
        description="The largest ratio that this structure reaches alone; null of `vocabulary`, which counts towards no ratio."
    )
    without_code: list[str] = Field(
        description="Layouts of a model that lost such units alone which the stock class of transformers loads without code."
    )
    gguf: list[str] = Field(description="Quantisations in which a GGUF file can be made in one of these layouts.")
    reason: str | None = Field(description="Why no unit of it can leave the model; null if some can.")


class Inspection(BaseModel):
    """The properties of a model that are known without its weights."""

    model_id: str
    revision: str | None = Field(description="The commit; null for a local model.")
    supported: bool = Field(description="Whether this service can prune it.")
    reason: JobError | None = Field(description="Why not.")
    shape: dict[str, Any] | None = Field(
        description="Family, parameters, largest ratio, and each layer's heads, KV groups and feed-forward width; "
        "null for a model that is not supported, and where it is known once the model is loaded: GGUF files on the Hub and types without an adapter."
    )
    sizes: list[PrunedSize] = Field([], description="What ratios of 0.2 and 0.5 come to; empty without a shape.")
    layouts: list[PossibleLayout] = Field([], description="What each layout allows; empty without a shape.")
    structures: list[PossibleStructure] = Field(
        [], description="What each kind of unit could give; empty without a shape."
    )
