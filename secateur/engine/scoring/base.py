"""Define what a scorer returns and receives: all scorers of the whole model have one function shape."""

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
    """Scores of the units of every layer, as float64 tensors on the CPU, one for each layer.

    ``kv_groups`` holds tensors ``[kv_groups]`` and ``channels`` tensors ``[channels]``. Within a layer, the units with
    the lowest scores are removed first.
    """

    kv_groups: list[Tensor]
    channels: list[Tensor]

    def of(self, structure: Structure) -> list[Tensor]:
        return self.kv_groups if structure == "kv_groups" else self.channels


@dataclass
class Context:
    """The model as it is in this round, and the calibration ``tokens`` ``[windows, length]`` on the model's device."""

    decoder: Decoder
    tokens: Tensor
    batch_windows: int
    resolved: Resolved
    target_ratio: float
    """Requested ratio of the finished model, not the ratio of this round."""
    seed: int
    progress: Progress
    reference: Decoder | None = None
    """The unpruned model if layers are fitted to it, else ``None``; in the first round it is ``decoder`` itself."""
    scores: Scores | None = None
    """Scores of the whole model; ``None`` until they are computed."""
    statistics: Statistics | None = None
    """Cache of what is known of the unpruned model; ``None`` in later rounds."""
    details: dict[str, Any] = field(default_factory=dict)
    """Decisions made while units are scored and shares allocated; the report of the round contains them."""

    def memo(self, name: str, compute: Callable[[], list[Tensor]]) -> list[Tensor]:
        """Return what ``compute`` returns, or the tensors that an earlier goal or job has stored under ``name``.

        ``compute`` may depend on the model, the tokens and the seed, and on nothing else in the request.
        """
        return compute() if self.statistics is None else self.statistics.get(name, compute)

    @cached_property
    def gates(self) -> list[GateStatistics]:
        """Gate statistics of every layer from two forward passes and one backward pass, which scorer and allocator share."""

        def compute() -> list[Tensor]:
            found = gate_statistics(self.decoder, self.tokens, self.batch_windows, self.progress)
            return [tensor for layer in found for tensor in vars(layer).values()]

        tensors = self.memo("gates", compute)
        return [GateStatistics(*tensors[start : start + 4]) for start in range(0, len(tensors), 4)]

    @cached_property
    def forward_statistics(self) -> ForwardStatistics:
        """Cosines and variances of every layer from one forward pass, which scorer and allocator share."""
        tensors = self.memo(
            "forward_statistics",
            lambda: forward_statistics(self.decoder, self.tokens, self.batch_windows, self.progress),
        )
        return ForwardStatistics.of(tensors)


Scorer = Callable[[Context], Scores]


def memoised(score: Scorer) -> Scorer:
    """Wrap a scorer so that it looks up stored scores before it computes them (see :meth:`Context.memo`).

    This is for a scorer whose own passes over the model are its main cost.
    """

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
    """Sum the block of rows that belongs to each KV group: ``[groups * n] -> [groups]``."""
    return rows.view(groups, -1).sum(1)


def l1_norms(decoder: Decoder) -> Scores:
    """Return ‖W_u‖1 over all weights and biases of each unit, as one tensor ``[units]`` for each layer."""
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
