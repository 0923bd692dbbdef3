"""The sizes and layouts that a pruned model can have, known from the source's config before any GPU is used."""

from collections.abc import Mapping
from typing import Any, get_args

from secateur.catalog.architectures import ModelShape
from secateur.catalog.budget import largest_ratio, obstacle
from secateur.catalog.gguf import GGUF_KINDS, gguf_obstacle
from secateur.catalog.spec import DTYPE_BYTES, Layout
from secateur.catalog.structures import STRUCTURES, WIDTHS
from secateur.contract.catalog import PossibleLayout, PossibleStructure, PrunedSize

EXAMPLES = (0.2, 0.5)


def sizes(shape: ModelShape, dtype: str) -> list[PrunedSize]:
    """Return the model's sizes after pruning by 20 % and by 50 %, or by the largest ratio if that is smaller.

    ``dtype`` is the dtype that ``auto`` stands for.
    """
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
    """Return every layout with its largest ratio and the kinds of GGUF file that it allows."""
    found = []
    for layout in get_args(Layout):
        obstacles = {kind: gguf_obstacle(shape, config, kind, uniform=layout != "per-layer") for kind in GGUF_KINDS}
        reasons = [f"{kind}: {obstacle.message}" for kind, obstacle in obstacles.items() if obstacle is not None]
        possible = PossibleLayout(
            layout=layout,
            max_ratio=0.0
            if layout != "per-layer" and shape.differs_in_kind
            else shape.max_ratio(uniform=layout == "uniform"),
            gguf=[kind for kind, obstacle in obstacles.items() if obstacle is None],
            gguf_reason=reasons[0] if reasons else None,
        )
        found.append(possible)
    return found


def structures(shape: ModelShape, config: Mapping[str, Any]) -> list[PossibleStructure]:
    """Return what each structure of the model could give alone, and the vocabulary, which counts towards no ratio."""
    every = range(len(shape.layers))
    gguf = [kind for kind in GGUF_KINDS if gguf_obstacle(shape, config, kind, uniform=True) is None]
    found = []
    for name in shape.family.structures:
        reason = obstacle(shape, config, name)
        possible = PossibleStructure(
            structure=name,
            units=sum(shape.units(name, index) for index in every),
            parameters=sum(shape.units(name, index) * shape.price(name, index) for index in every),
            max_ratio=largest_ratio(shape, name) if reason is None else 0.0,
            without_code=_without_code(shape, config, name),
            gguf=gguf,
            reason=reason,
        )
        found.append(possible)
    vocabulary = PossibleStructure(
        structure="vocabulary",
        units=shape.vocab_size,
        parameters=shape.vocabulary_parameters,
        max_ratio=None,
        without_code=_without_code(shape, config, None),
        gguf=gguf,
        reason=None,
    )
    return [*found, vocabulary]


def _without_code(shape: ModelShape, config: Mapping[str, Any], name: str | None) -> list[str]:
    """Return the layouts that the stock class holds after units of ``name``, or tokens alone, left."""
    if config.get("added_biases"):  # the stock class has no place for them
        return []
    if shape.differs_in_kind:
        whole = name is None or STRUCTURES[name].alike
        return ["per-layer"] if whole and not shape.differs else []
    if name in WIDTHS:
        groups, _ = shape.common_units(1, shape.layers)
        return ["uniform", "padded"] if len(groups) > (name == "kv_groups") else ["padded"]
    if shape.differs or (name is not None and not STRUCTURES[name].alike):
        return ["padded"]
    return list(get_args(Layout))
