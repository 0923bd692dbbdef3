"""What a scorer returns, and what it is given: one function shape for all that look at the whole model."""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property, wraps
from typing import Any

import torch
from torch import Tensor

from secateur.catalog.resolve import Resolved
from secateur.engine.measure.cache import Statistics
from secateur.engine.measure.forward_statistics import ForwardStatistics, forward_statistics
from secateur.engine.measure.gates import GateStatistics, Progress, gate_statistics
from secateur.engine.model.decoder import Decoder, Structure


@dataclass(frozen=True)
class Scores:
    """Scores by layer, float64 on the CPU; within a layer the lowest go first. ``[kv_groups]`` and ``[channels]``."""

    kv_groups: list[Tensor]
    channels: list[Tensor]

    def of(self, structure: Structure) -> list[Tensor]:
        return self.kv_groups if structure == "kv_groups" else self.channels


@dataclass
class Context:
    """The model as it is in this round, and the calibration ``tokens`` ``[windows, length]`` on its device."""

    decoder: Decoder
    tokens: Tensor
    batch_windows: int
    resolved: Resolved
    target_ratio: float
    """Of the whole job, not of this round."""
    seed: int
    progress: Progress
    reference: Decoder | None = None
    """The unpruned model, where layers are fitted to it: ``decoder`` itself in the first round."""
    scores: Scores | None = None
    """Of the whole model, once they are taken."""
    statistics: Statistics | None = None
    """Where what is known of the unpruned model is kept; none in later rounds."""
    details: dict[str, Any] = field(default_factory=dict)
    """What was decided on the way, for the round's report."""

    def memo(self, name: str, compute: Callable[[], list[Tensor]]) -> list[Tensor]:
        """What ``compute`` finds out about the model, from an earlier target or job if it was found out there.

        It may depend on model, tokens and seed, and on nothing else in the request.
        """
        return compute() if self.statistics is None else self.statistics.get(name, compute)

    @cached_property
    def gates(self) -> list[GateStatistics]:
        """Gate statistics of every layer: one forward and backward, shared by scorer and allocator."""

        def compute() -> list[Tensor]:
            found = gate_statistics(self.decoder, self.tokens, self.batch_windows, self.progress)
            return [tensor for layer in found for tensor in vars(layer).values()]

        tensors = self.memo("gates", compute)
        return [GateStatistics(*tensors[start : start + 4]) for start in range(0, len(tensors), 4)]

    @cached_property
    def forward_statistics(self) -> ForwardStatistics:
        """What one forward tells of every layer, cosines and variances, shared by scorer and allocator."""
        tensors = self.memo(
            "forward_statistics",
            lambda: forward_statistics(self.decoder, self.tokens, self.batch_windows, self.progress),
        )
        return ForwardStatistics.of(tensors)


Scorer = Callable[[Context], Scores]


def memoised(score: Scorer) -> Scorer:
    """For a scorer whose own passes over the model are what costs: its scores are looked up first, see :meth:`Context.memo`."""

    @wraps(score)
    def look_up(context: Context) -> Scores:
        def compute() -> list[Tensor]:
            scores = score(context)
            return [*scores.kv_groups, *scores.channels]

        tensors, layers = (
            context.memo(f"scores-{context.resolved.components.scorer.name}", compute),
            len(context.decoder.layers),
        )
        return Scores(tensors[:layers], tensors[layers:])

    return look_up


def by_group(rows: Tensor, groups: int) -> Tensor:
    """Sum of blocks of rows that belong to one KV group: ``[groups * n] -> [groups]``."""
    return rows.view(groups, -1).sum(1)


def l1_norms(decoder: Decoder) -> Scores:
    """‖W_u‖1 over all of a unit's weights, biases included, ``[units]`` a layer."""
    kv_groups, channels = [], []
    for layer in decoder.layers:
        family = layer.family
        groups = layer.attention_output.weight.abs().sum(0, dtype=torch.float64)
        total = by_group(groups, layer.kv_groups)
        for name in family.attention_inputs:
            total = total + by_group(_rows(layer[name]), layer.kv_groups)
        kv_groups.append(total.cpu())
        width = layer.channel_output.weight.abs().sum(0, dtype=torch.float64)
        for name in family.channel_inputs:
            width = width + _rows(layer[name])
        channels.append(width.cpu())
    return Scores(kv_groups, channels)


def _rows(linear: torch.nn.Linear) -> Tensor:
    rows = linear.weight.abs().sum(1, dtype=torch.float64)
    return rows if linear.bias is None else rows + linear.bias.abs().double()
