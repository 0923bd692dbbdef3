"""What a scorer returns, and what it is given: one function shape for all."""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from app.catalog.spec import Scoring
from workers.engine.decoder import Decoder
from workers.engine.gates import GateStatistics, Progress, gate_statistics


@dataclass(frozen=True)
class Scores:
    """Scores by layer, float64 on the CPU; within a layer the lowest go first. ``[kv_groups]`` and ``[channels]``."""

    heads: list[Tensor]
    channels: list[Tensor]


@dataclass
class Context:
    """The model as it is in this round, and the calibration ``tokens`` ``[windows, length]`` on its device."""

    decoder: Decoder
    tokens: Tensor
    batch_windows: int
    scoring: Scoring
    seed: int
    progress: Progress
    details: dict[str, Any] = field(default_factory=dict)
    """What the scorer decided for itself, for the round's report."""

    @cached_property
    def gates(self) -> list[GateStatistics]:
        """Gate statistics of every layer: one forward and backward, shared by scorer and allocator."""
        return gate_statistics(self.decoder, self.tokens, self.batch_windows, self.progress)


Scorer = Callable[[Context], Scores]


def by_group(rows: Tensor, groups: int) -> Tensor:
    """Sum of blocks of rows that belong to one KV group: ``[groups * n] -> [groups]``."""
    return rows.view(groups, -1).sum(1)


def l1_norms(decoder: Decoder) -> Scores:
    """‖W_u‖1 over all of a unit's weights, biases included, ``[units]`` a layer."""
    heads, channels = [], []
    for layer in decoder.layers:
        family = layer.family
        groups = layer.attention_output.weight.abs().sum(0, dtype=torch.float64)
        total = by_group(groups, layer.kv_groups)
        for name in family.attention_inputs:
            total = total + by_group(_rows(layer[name]), layer.kv_groups)
        heads.append(total.cpu())
        width = layer.channel_output.weight.abs().sum(0, dtype=torch.float64)
        for name in family.channel_inputs:
            width = width + _rows(layer[name])
        channels.append(width.cpu())
    return Scores(heads, channels)


def _rows(linear: torch.nn.Linear) -> Tensor:
    rows = linear.weight.abs().sum(1, dtype=torch.float64)
    return rows if linear.bias is None else rows + linear.bias.abs().double()
