"""A pruning plan as plain data: which units of the source model each layer keeps."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from pydantic import BaseModel, ConfigDict

from secateur.catalog.architectures import LayerShape, ModelShape
from secateur.contract.report import LayerWidths


class LayerUnits(BaseModel):
    """The JSON form of what a layer keeps: KV groups one by one, channels as ranges ``[first, last]``."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    kv_groups: tuple[int, ...]
    channels: tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class LayerPlan:
    """Units kept, by their index in the source model, ascending."""

    kv_groups: tuple[int, ...]
    channels: tuple[int, ...]


@dataclass(frozen=True)
class Plan:
    """What every layer keeps. Slicing is a pure function of the source weights and a plan."""

    layers: tuple[LayerPlan, ...]

    @classmethod
    def full(cls, layers: tuple[LayerShape, ...]) -> "Plan":
        """The plan that keeps everything."""
        return cls(tuple(LayerPlan(tuple(range(s.kv_groups)), tuple(range(s.channels))) for s in layers))

    def then(self, later: "Plan") -> "Plan":
        """This plan followed by ``later``, a plan made on its result, as one plan over the source."""
        return Plan(
            tuple(
                LayerPlan(
                    tuple(first.kv_groups[index] for index in second.kv_groups),
                    tuple(first.channels[index] for index in second.channels),
                )
                for first, second in zip(self.layers, later.layers, strict=True)
            )
        )

    def widths(self, shape: ModelShape) -> list[LayerWidths]:
        """How many units each layer keeps; ``shape`` is the source's."""
        source = shape.layers[0]
        return [
            LayerWidths(
                layer=index,
                kv_groups=len(layer.kv_groups),
                heads=len(layer.kv_groups) * source.heads_per_group,
                channels=len(layer.channels) // source.experts,
            )
            for index, layer in enumerate(self.layers)
        ]

    def parameters(self, shape: ModelShape) -> int:
        """Prunable parameters that are left; ``shape`` is the source's."""
        cost, experts = shape.cost, shape.layers[0].experts
        return sum(
            len(layer.kv_groups) * cost.kv_group + len(layer.channels) // experts * cost.channel + cost.fixed
            for layer in self.layers
        )

    def as_data(self) -> tuple[LayerUnits, ...]:
        """The JSON form."""
        return tuple(LayerUnits(kv_groups=layer.kv_groups, channels=_ranges(layer.channels)) for layer in self.layers)

    @classmethod
    def from_data(cls, layers: Iterable[LayerUnits]) -> "Plan":
        """The plan of a JSON form."""
        return cls(
            tuple(
                LayerPlan(
                    layer.kv_groups,
                    tuple(index for first, last in layer.channels for index in range(first, last + 1)),
                )
                for layer in layers
            )
        )


def widths_of(layers: Sequence[LayerShape]) -> list[LayerWidths]:
    """The widths of layers of these shapes."""
    return [
        LayerWidths(layer=index, kv_groups=layer.kv_groups, heads=layer.heads, channels=layer.channels_per_expert)
        for index, layer in enumerate(layers)
    ]


def _ranges(indices: tuple[int, ...]) -> tuple[tuple[int, int], ...]:
    ranges: list[tuple[int, int]] = []
    for index in indices:
        if ranges and ranges[-1][1] == index - 1:
            ranges[-1] = (ranges[-1][0], index)
        else:
            ranges.append((index, index))
    return tuple(ranges)
