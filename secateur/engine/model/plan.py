"""A pruning plan as plain data: which units of the source model each layer keeps."""

from dataclasses import dataclass
from typing import Any

from secateur.catalog.architectures import LayerShape, ModelShape


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
        """This plan followed by one made on its result, as one plan over the source."""
        return Plan(
            tuple(
                LayerPlan(
                    tuple(first.kv_groups[index] for index in second.kv_groups),
                    tuple(first.channels[index] for index in second.channels),
                )
                for first, second in zip(self.layers, later.layers, strict=True)
            )
        )

    def widths(self, shape: ModelShape) -> list[dict[str, int]]:
        """Per layer, what is left: for the report and the config."""
        source = shape.layers[0]
        return [
            {
                "layer": index,
                "kv_groups": len(layer.kv_groups),
                "heads": len(layer.kv_groups) * source.heads_per_group,
                "channels": len(layer.channels) // source.experts,
            }
            for index, layer in enumerate(self.layers)
        ]

    def parameters(self, shape: ModelShape) -> int:
        """Prunable parameters that are left."""
        cost, experts = shape.cost, shape.layers[0].experts
        return sum(
            len(layer.kv_groups) * cost.kv_group + len(layer.channels) // experts * cost.channel + cost.fixed
            for layer in self.layers
        )

    def as_dict(self) -> list[dict[str, Any]]:
        """JSON form: index ranges ``[first, last]`` rather than long lists."""
        return [{"kv_groups": list(layer.kv_groups), "channels": _ranges(layer.channels)} for layer in self.layers]

    @classmethod
    def from_dict(cls, layers: list[dict[str, Any]]) -> "Plan":
        return cls(
            tuple(
                LayerPlan(
                    tuple(layer["kv_groups"]),
                    tuple(index for first, last in layer["channels"] for index in range(first, last + 1)),
                )
                for layer in layers
            )
        )


def _ranges(indices: tuple[int, ...]) -> list[list[int]]:
    ranges: list[list[int]] = []
    for index in indices:
        if ranges and ranges[-1][1] == index - 1:
            ranges[-1][1] = index
        else:
            ranges.append([index, index])
    return ranges
