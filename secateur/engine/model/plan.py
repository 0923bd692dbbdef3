"""A pruning plan as plain data: the units of the source model that each layer keeps."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from pydantic import BaseModel, ConfigDict

from secateur.catalog.architectures import LayerShape, ModelShape
from secateur.contract.report import LayerWidths


class LayerUnits(BaseModel):
    """JSON form of the units that a layer keeps: single KV groups, and channels as ranges ``[first, last]``."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    kv_groups: tuple[int, ...]
    channels: tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class LayerPlan:
    """The units that a layer keeps, as ascending indices in the source model."""

    kv_groups: tuple[int, ...]
    channels: tuple[int, ...]


@dataclass(frozen=True)
class Plan:
    """The units that every layer keeps. Cutting depends only on the source weights and on a plan."""

    layers: tuple[LayerPlan, ...]

    @classmethod
    def full(cls, layers: tuple[LayerShape, ...]) -> "Plan":
        """Return the plan that keeps every unit."""
        return cls(tuple(LayerPlan(tuple(range(s.kv_groups)), tuple(range(s.channels))) for s in layers))

    def then(self, later: "Plan") -> "Plan":
        """Return one plan over the source that equals this plan followed by ``later``.

        The indices of ``later`` count the units that this plan keeps.
        """
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
        """Return the number of units that each layer keeps; ``shape`` is the source's shape."""
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
        """Return the number of prunable parameters that the plan keeps; ``shape`` is the source's shape."""
        cost, experts = shape.cost, shape.layers[0].experts
        return sum(
            len(layer.kv_groups) * cost.kv_group + len(layer.channels) // experts * cost.channel + cost.fixed
            for layer in self.layers
        )

    def as_data(self) -> tuple[LayerUnits, ...]:
        """Return the JSON form of the plan."""
        return tuple(LayerUnits(kv_groups=layer.kv_groups, channels=_ranges(layer.channels)) for layer in self.layers)

    @classmethod
    def from_data(cls, layers: Iterable[LayerUnits]) -> "Plan":
        """Return the plan of a JSON form."""
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
    """Return the widths of layers with the given shapes."""
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
