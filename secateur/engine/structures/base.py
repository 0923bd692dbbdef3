"""What the engine asks of a structure, and the form that all width structures share.

A width structure has input projections with rows for each unit, and an output projection with columns for each unit.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from secateur.catalog.architectures import Family
from secateur.engine.model.decoder import Layer


class Structure(ABC):
    """A kind of unit of decoder layers; the catalog's entry of the same name has its prices."""

    name: ClassVar[str]

    @abstractmethod
    def units(self, layer: Layer) -> int:
        """Return the number of units that the layer has now; 0 if the layer lacks the structure."""

    @abstractmethod
    def cut(self, layer: Layer, kept: Sequence[int]) -> None:
        """Cut the layer in place to the units ``kept``; their indices are ascending and count the units of now."""

    def best(self, layer: Layer, scores: Tensor, count: int) -> tuple[int, ...]:
        """Return the ``count`` units with the highest ``scores`` ``[units]``, as ascending indices.

        Of units with equal scores, the first ones are returned.
        """
        return tuple(sorted(scores.sort(descending=True, stable=True).indices[:count].tolist()))

    def held(self, layer: Layer, kept: Sequence[int]) -> Mapping[str, tuple[int, ...]]:
        """Return the units of other structures that stay if the units ``kept`` do, by structure, as ascending indices.

        Both count the units of now. All units stay of a structure that is missing here.
        """
        return {}


class Width(Structure):
    """A structure whose units are rows and columns of projections, which become smaller when the units are cut.

    In a mixture of experts, the units of all experts stand one after the other; each expert has the same number.
    """

    part: ClassVar[Literal["attention", "feed_forward"]]
    """The sub-layer whose output the units make."""
    single: ClassVar[bool]
    """Whether a unit is one input of the output projection, and not a block of inputs."""

    @abstractmethod
    def input_names(self, family: Family) -> tuple[str, ...]:
        """Return the names of the input projections."""

    @abstractmethod
    def output_name(self, family: Family) -> str:
        """Return the name of the output projection."""

    @abstractmethod
    def width(self, layer: Layer) -> int:
        """Return the number of inputs of the output projection that belong to one unit."""

    def experts(self, layer: Layer) -> int:
        """Return the number of experts that share this structure's units; each expert holds the same number."""
        return 1

    def inputs(self, layer: Layer) -> list[nn.Linear]:
        """Return the layer's input projections of the structure."""
        return [layer[name] for name in self.input_names(layer.family)]

    def output(self, layer: Layer) -> nn.Linear:
        """Return the layer's output projection of the structure; its input holds the units side by side."""
        return layer[self.output_name(layer.family)]

    def units(self, layer: Layer) -> int:
        name = self.output_name(layer.family)
        return layer[name].in_features // self.width(layer) if name in layer.projections else 0

    def cut(self, layer: Layer, kept: Sequence[int]) -> None:
        units = self.units(layer)
        if len(kept) == units:
            return
        output = self.output(layer)
        indices = torch.tensor(kept, device=output.weight.device)
        _cut_columns(output, expand(indices, output.in_features // units))
        for projection in self.inputs(layer):
            _cut_rows(projection, expand(indices, projection.out_features // units))
        layer.tell_sizes()

    def pad(self, layer: Layer, units: int) -> None:
        """Append zero units to each expert until the expert has ``units`` units."""
        experts, output = self.experts(layer), self.output(layer)
        now = self.units(layer) // experts

        def padded(parameter: Tensor, dim: int) -> nn.Parameter:
            blocks = parameter.detach().unflatten(dim, (experts, now, -1))
            sides = (0, 0) * (parameter.dim() - dim) + (0, units - now)
            filled = nn.functional.pad(blocks, sides).flatten(dim, dim + 2)
            return nn.Parameter(filled, requires_grad=parameter.requires_grad)

        output.weight = padded(output.weight, 1)
        output.in_features = output.weight.shape[1]
        for projection in self.inputs(layer):
            projection.weight = padded(projection.weight, 0)
            if projection.bias is not None:
                projection.bias = padded(projection.bias, 0)
            projection.out_features = len(projection.weight)
        layer.tell_sizes()

    @contextmanager
    def gated(self, layer: Layer, gate: Tensor) -> Iterator[None]:
        """Multiply the output of each unit by its gate while the context lasts.

        ``gate`` is ``[windows, units]``; a single row is broadcast to all windows. Gate 1 leaves a unit unchanged and
        gate 0 sets it to zero. The gradient of the loss with respect to a gate is ∂L/∂u of PIEM.
        """
        wide = gate.repeat_interleave(self.width(layer), dim=1)
        hook = self.output(layer).register_forward_pre_hook(
            lambda _, args: (_times(args[0], wide.to(args[0])),),
        )
        try:
            yield
        finally:
            hook.remove()


def expand(units: Tensor, width: int) -> Tensor:
    """Return the row indices ``[units * width]`` of the given units, each of which is a block of ``width`` rows."""
    return (units[:, None] * width + torch.arange(width, device=units.device)).flatten()


def _times(inputs: Tensor, gate: Tensor) -> Tensor:
    """Multiply ``inputs`` ``[windows, length, in]`` by ``gate`` ``[windows, in]`` or ``[1, in]``.

    ``inputs`` may also be ``[windows * length, in]``, as some layers call their projections.
    """
    return (inputs.reshape(len(gate), -1, gate.shape[1]) * gate[:, None]).view_as(inputs)


def _cut_rows(linear: nn.Linear, rows: Tensor) -> None:
    linear.weight = nn.Parameter(linear.weight.detach()[rows].contiguous(), requires_grad=linear.weight.requires_grad)
    if linear.bias is not None:
        linear.bias = nn.Parameter(linear.bias.detach()[rows].contiguous(), requires_grad=linear.bias.requires_grad)
    linear.out_features = len(rows)


def _cut_columns(linear: nn.Linear, columns: Tensor) -> None:
    weight = linear.weight.detach()[:, columns].contiguous()
    linear.weight = nn.Parameter(weight, requires_grad=linear.weight.requires_grad)
    linear.in_features = len(columns)
