"""Real removal: a plan becomes smaller tensors. No mask is left behind."""

import torch
from torch import Tensor, nn

from workers.engine.decoder import Decoder, Layer
from workers.engine.plan import LayerPlan, Plan


def apply_plan(decoder: Decoder, plan: Plan) -> None:
    """Cut every layer in place to the units that ``plan`` keeps, by their index in the model *as it is now*."""
    for layer, kept in zip(decoder.layers, plan.layers, strict=True):
        _cut_layer(layer, kept)


def _cut_layer(layer: Layer, kept: LayerPlan) -> None:
    family, device = layer.family, layer.attention_output.weight.device
    groups, channels = (torch.tensor(units, device=device) for units in (kept.kv_groups, kept.channels))
    if len(groups) < layer.kv_groups:
        queries = _expand(groups, layer.group_width)
        keys = _expand(groups, layer.head_dim)
        _cut_rows(layer[family.query], queries)
        _cut_rows(layer[family.key], keys)
        _cut_rows(layer[family.value], keys)
        _cut_columns(layer.attention_output, queries)
    if len(channels) < layer.channels:
        for name in family.channel_inputs:
            _cut_rows(layer[name], channels)
        _cut_columns(layer.channel_output, channels)


def _expand(units: Tensor, width: int) -> Tensor:
    """Indices of the rows of blocks of ``width``: ``[units * width]``."""
    return (units[:, None] * width + torch.arange(width, device=units.device)).flatten()


def _cut_rows(linear: nn.Linear, rows: Tensor) -> None:
    linear.weight = nn.Parameter(linear.weight.detach()[rows].contiguous(), requires_grad=linear.weight.requires_grad)
    if linear.bias is not None:
        linear.bias = nn.Parameter(linear.bias.detach()[rows].contiguous(), requires_grad=linear.bias.requires_grad)
    linear.out_features = len(rows)


def _cut_columns(linear: nn.Linear, columns: Tensor) -> None:
    weight = linear.weight.detach()[:, columns].contiguous()
    linear.weight = nn.Parameter(weight, requires_grad=linear.weight.requires_grad)
    linear.in_features = len(columns)
