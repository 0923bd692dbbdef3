"""A pruning plan as plain data: the units of the source model that stay, by structure."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict

from secateur.catalog.architectures import LayerShape, ModelShape
from secateur.catalog.structures import STRUCTURES, WIDTHS
from secateur.contract.report import LayerWidths

VERSION: Literal[2] = 2

Kept = Mapping[str, tuple[int, ...]]
"""The units that stay, by structure, as ascending indices in the source; all units of other structures stay."""
Ranges = tuple[tuple[int, int], ...]


class _PlanData(BaseModel):
    """JSON form of a plan: the units that stay, by structure, as ranges ``[first, last]``."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    version: Literal[2] = VERSION
    layers: tuple[dict[str, Ranges], ...]
    model: dict[str, Ranges] = {}


def _read_version_1(data: Any) -> Any:
    """Return the present form of the first one: a list of layers, with single KV groups and ranges of channels."""
    if not isinstance(data, list | tuple):
        return data
    layers = [{**layer, "kv_groups": [[group, group] for group in layer["kv_groups"]]} for layer in data]
    return {"version": VERSION, "layers": layers}


PlanData = Annotated[_PlanData, BeforeValidator(_read_version_1)]
"""JSON form of a plan, see :class:`_PlanData`; the form of version 1 is read."""


@dataclass(frozen=True)
class Plan:
    """The units that every layer and the model keep. Cutting depends only on the source weights and on a plan."""

    layers: tuple[Kept, ...]
    model: Kept = field(default_factory=dict)
    """The units of structures that belong to no layer."""

    @classmethod
    def full(cls, layers: Sequence[LayerShape]) -> "Plan":
        """Return the plan that keeps every unit and names the units of the width structures."""
        return cls(
            tuple({name: tuple(range(getattr(layer, name))) for name in WIDTHS} for layer in layers),
        )

    def then(self, later: "Plan") -> "Plan":
        """Return one plan over the source that equals this plan followed by ``later``.

        The indices of ``later`` count the units that this plan keeps.
        """
        pairs = zip(self.layers, later.layers, strict=True)
        return Plan(tuple(_then(first, second) for first, second in pairs), _then(self.model, later.model))

    def shapes(self, shape: ModelShape, structures: Sequence[str] = tuple(STRUCTURES)) -> list[LayerShape]:
        """Return the sizes of each layer that the plan leaves; ``shape`` is the source's shape.

        Of other structures than ``structures``, all units count, unless they left with a unit of these.
        """
        return [_left(source, kept, structures) for source, kept in zip(shape.layers, self.layers, strict=True)]

    def widths(self, shape: ModelShape) -> list[LayerWidths]:
        """Return the number of units that each layer keeps; ``shape`` is the source's shape."""
        return widths_of(self.shapes(shape))

    def parameters(self, shape: ModelShape) -> int:
        """Return the number of prunable parameters that the plan keeps; ``shape`` is the source's shape."""
        return sum(shape.layer_parameters(index, left) for index, left in enumerate(self.shapes(shape)))

    def as_data(self) -> _PlanData:
        """Return the JSON form of the plan."""
        return _PlanData(layers=tuple(map(_as_ranges, self.layers)), model=_as_ranges(self.model))

    @classmethod
    def from_data(cls, data: _PlanData) -> "Plan":
        """Return the plan of a JSON form."""
        return cls(tuple(map(_indices, data.layers)), _indices(data.model))


def widths_of(layers: Iterable[LayerShape]) -> list[LayerWidths]:
    """Return the widths of layers with the given shapes."""
    return [
        LayerWidths(
            layer=index,
            kv_groups=layer.kv_groups,
            heads=layer.heads,
            channels=layer.channels_per_expert,
            experts=layer.experts,
        )
        for index, layer in enumerate(layers)
    ]


def _then(first: Kept, second: Kept) -> Kept:
    both = {name: tuple(first[name][index] for index in second[name]) for name in first.keys() & second.keys()}
    return {**first, **second, **both}


def _left(layer: LayerShape, kept: Kept, structures: Sequence[str]) -> LayerShape:
    """Return the sizes of ``layer`` with the units ``kept`` of ``structures`` alone."""
    for name, structure in STRUCTURES.items():
        if name in kept and name in structures:
            layer = structure.left(layer, len(kept[name]))
    return layer


def _as_ranges(kept: Kept) -> dict[str, Ranges]:
    return {structure: ranges_of(indices) for structure, indices in kept.items()}


def _indices(kept: Mapping[str, Ranges]) -> Kept:
    return {structure: indices_of(ranges) for structure, ranges in kept.items()}


def indices_of(ranges: Ranges) -> tuple[int, ...]:
    """Return the indices of ranges ``[first, last]``."""
    return tuple(index for first, last in ranges for index in range(first, last + 1))


def ranges_of(indices: tuple[int, ...]) -> Ranges:
    """Return ascending indices as ranges ``[first, last]``."""
    ranges: list[tuple[int, int]] = []
    for index in indices:
        if ranges and ranges[-1][1] == index - 1:
            ranges[-1] = (ranges[-1][0], index)
        else:
            ranges.append((index, index))
    return tuple(ranges)
