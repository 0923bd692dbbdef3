"""Tensor cutting: a plan is applied by making the weight tensors smaller; no mask remains in the model."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from secateur.engine.model.decoder import STRUCTURES, Decoder, Layer, Structure
from secateur.engine.model.plan import Plan


def apply_plan(decoder: Decoder, plan: Plan) -> None:
    """Cut every layer in place to the units that ``plan`` keeps.

    The indices in ``plan`` count the units of the model *as it is now*.
    """
    for layer, kept in zip(decoder.layers, plan.layers, strict=True):
        cut(layer, "kv_groups", kept.kv_groups)
        cut(layer, "channels", kept.channels)


def cut(layer: Layer, structure: Structure, kept: Sequence[int]) -> None:
    """Cut one structure of a layer in place to the units ``kept``; their indices are ascending."""
    if len(kept) == layer.units(structure):
        return
    output, units = layer.output(structure), layer.units(structure)
    indices = torch.tensor(kept, device=output.weight.device)
    _cut_columns(output, expand(indices, output.in_features // units))
    for projection in layer.inputs(structure):
        _cut_rows(projection, expand(indices, projection.out_features // units))
    layer.tell_sizes()


@contextmanager
def padded(decoder: Decoder, *, enabled: bool = True) -> Iterator[None]:
    """Pad every layer with zero units to the widths of the widest layer while the context lasts.

    The model's output does not change. KV groups are padded further when the stock class does not allow their number.
    With ``enabled`` false, nothing changes.
    """
    if not enabled:
        yield
        return
    before = [{structure: layer.units(structure) for structure in STRUCTURES} for layer in decoder.layers]
    _pad(decoder)
    try:
        yield
    finally:
        for layer, units in zip(decoder.layers, before, strict=True):
            for structure in STRUCTURES:
                experts = layer.experts(structure)
                own, wide = units[structure] // experts, layer.units(structure) // experts
                cut(layer, structure, [expert * wide + unit for expert in range(experts) for unit in range(own)])


def _pad(decoder: Decoder) -> None:
    shape, source = decoder.shape, decoder.shape.layers[0]
    most = max(layer.kv_groups for layer in decoder.layers)
    fewer = (source.without(gone) for gone in range(source.kv_groups - most, -1, -1))
    units = {
        "kv_groups": next(layer.kv_groups for layer in fewer if shape.takes_heads(layer)),
        "channels": max(layer.shape.channels_per_expert for layer in decoder.layers),
    }
    for layer in decoder.layers:
        for structure in STRUCTURES:
            _fill_up(layer, structure, units[structure])
        layer.tell_sizes()


def expand(units: Tensor, width: int) -> Tensor:
    """Return the row indices ``[units * width]`` of the given units, each of which is a block of ``width`` rows."""
    return (units[:, None] * width + torch.arange(width, device=units.device)).flatten()


def _fill_up(layer: Layer, structure: Structure, units: int) -> None:
    """Append zero units to each expert until the expert has ``units`` units of the structure."""
    experts, output = layer.experts(structure), layer.output(structure)
    now = layer.units(structure) // experts

    def padded(parameter: Tensor, dim: int) -> nn.Parameter:
        blocks = parameter.detach().unflatten(dim, (experts, now, -1))
        sides = (0, 0) * (parameter.dim() - dim) + (0, units - now)
        filled = nn.functional.pad(blocks, sides).flatten(dim, dim + 2)
        return nn.Parameter(filled, requires_grad=parameter.requires_grad)

    output.weight = padded(output.weight, 1)
    output.in_features = output.weight.shape[1]
    for projection in layer.inputs(structure):
        projection.weight = padded(projection.weight, 0)
        if projection.bias is not None:
            projection.bias = padded(projection.bias, 0)
        projection.out_features = len(projection.weight)


def _cut_rows(linear: nn.Linear, rows: Tensor) -> None:
    linear.weight = nn.Parameter(linear.weight.detach()[rows].contiguous(), requires_grad=linear.weight.requires_grad)
    if linear.bias is not None:
        linear.bias = nn.Parameter(linear.bias.detach()[rows].contiguous(), requires_grad=linear.bias.requires_grad)
    linear.out_features = len(rows)


def _cut_columns(linear: nn.Linear, columns: Tensor) -> None:
    weight = linear.weight.detach()[:, columns].contiguous()
    linear.weight = nn.Parameter(weight, requires_grad=linear.weight.requires_grad)
    linear.in_features = len(columns)
