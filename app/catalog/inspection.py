"""What can be made of a model, known from its config alone: before anyone spends a GPU."""

from collections.abc import Mapping
from typing import Any, get_args

from pydantic import BaseModel, Field

from app.catalog.architectures import ModelShape
from app.catalog.gguf import GGUF_KINDS, GgufKind, gguf_obstacle
from app.catalog.spec import DTYPE_BYTES, Layout

EXAMPLES = (0.2, 0.5)


class PrunedSize(BaseModel):
    """What a target ratio comes to."""

    target_ratio: float
    nearest_ratio: float = Field(description="The ratio that will be reached.")
    parameters: int
    bytes: int = Field(description="Of the weights, in the model's own dtype.")


class PossibleLayout(BaseModel):
    """What a layout allows."""

    layout: Layout
    max_ratio: float = Field(description="The largest ratio.")
    gguf: list[GgufKind] = Field(description="Quantisations in which a GGUF file can be made.")
    gguf_reason: str | None = Field(description="Why not in the others.")


def sizes(shape: ModelShape, dtype: str) -> list[PrunedSize]:
    """At 20 % and 50 %, or as much as can be; ``dtype`` is the one that ``auto`` stands for."""
    found = []
    for ratio in EXAMPLES:
        nearest = shape.nearest_ratio(min(ratio, shape.max_ratio()))
        parameters = shape.parameters - round(nearest * shape.prunable_parameters)
        size = PrunedSize(
            target_ratio=ratio, nearest_ratio=nearest, parameters=parameters, bytes=parameters * DTYPE_BYTES[dtype]
        )
        found.append(size)
    return found


def layouts(shape: ModelShape, config: Mapping[str, Any]) -> list[PossibleLayout]:
    """Every layout, and the GGUF files that can be made of it."""
    found = []
    for layout in get_args(Layout):
        obstacles = {kind: gguf_obstacle(shape, config, kind, uniform=layout != "per-layer") for kind in GGUF_KINDS}
        reasons = [f"{kind}: {obstacle.message}" for kind, obstacle in obstacles.items() if obstacle is not None]
        possible = PossibleLayout(
            layout=layout,
            max_ratio=shape.max_ratio(uniform=layout == "uniform"),
            gguf=[kind for kind, obstacle in obstacles.items() if obstacle is None],
            gguf_reason=reasons[0] if reasons else None,
        )
        found.append(possible)
    return found
