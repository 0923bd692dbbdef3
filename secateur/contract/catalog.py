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
    passes: str = Field(description="What scoring costs in a round.")


class Kinds(BaseModel):
    """The kinds of scorer, allocator, layer-wise recovery and training that can replace the components of a method.

    Every combination is allowed but one: the allocator `threshold` needs scores of the whole model, and the scorers
    `lorap`, `obs`, `slimllm` and `wanda` do not compute such scores.
    """

    scorer: list[str] = Field(description="For `scoring.kind`.")
    allocator: list[str] = Field(description="For `allocation.kind`.")
    layerwise_recovery: list[str] = Field(description="For `recovery.layerwise.kind`.")
    training: list[str] = Field(description="For `recovery.training.kind`.")


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
