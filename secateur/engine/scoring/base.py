"""Define what a scorer returns and receives: all scorers of the whole model have one function shape."""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property, wraps
from typing import Any

import torch
from torch import Tensor

from secateur.catalog.architectures import ModelShape
from secateur.catalog.resolve import Resolved
from secateur.engine.measure.cache import Statistics
from secateur.engine.measure.forward_statistics import ForwardStatistics, forward_statistics
from secateur.engine.measure.gates import GateStatistics, LayerGates, Progress, gate_statistics
from secateur.engine.model.decoder import Decoder, Layer
from secateur.engine.structures import WIDTHS, Width

Scores = dict[str, list[Tensor]]
"""Scores of the units, by structure: for each layer a float64 tensor ``[units]`` on the CPU.

Within a layer, the units with the lowest scores are removed first.
"""


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
    """The model to which layers are fitted, else ``None``: the unpruned model, or ``decoder`` itself as the round begins."""
    scores: Scores | None = None
    """Scores of the whole model; ``None`` until they are computed."""
    statistics: Statistics | None = None
    """Cache of what is known of the unpruned model; ``None`` once something was cut."""
    begun: ModelShape = field(init=False)
    """The sizes of the model from which the widths are cut: the source without its removed whole units."""
    details: dict[str, Any] = field(default_factory=dict)
    """Decisions made while units are scored and shares allocated; the report of the round contains them."""

    def __post_init__(self) -> None:
        self.begun = self.decoder.shape

    def memo(self, name: str, compute: Callable[[], list[Tensor]]) -> list[Tensor]:
        """Return what ``compute`` returns, or the tensors that an earlier goal or job has stored under ``name``.

        ``compute`` may depend on the model, the tokens and the seed, and on nothing else in the request.
        """
        return compute() if self.statistics is None else self.statistics.get(name, compute)

    @cached_property
    def gates(self) -> list[LayerGates]:
        """Gate statistics of every layer, by structure, from two forward passes and one backward pass, which scorer and allocator share."""

        def compute() -> list[Tensor]:
            found = gate_statistics(self.decoder, self.tokens, self.batch_windows, self.progress)
            return [tensor for layer in found for gates in layer.values() for tensor in vars(gates).values()]

        left = iter(self.memo("gates", compute))
        return [{name: GateStatistics(next(left), next(left)) for name in WIDTHS} for _ in self.decoder.layers]

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
            return [tensor for name in WIDTHS for tensor in scores[name]]

        left = iter(context.memo(f"scores-{context.resolved.components.scorer.name}", compute))
        return {name: [next(left) for _ in context.decoder.layers] for name in WIDTHS}

    return look_up


def by_unit(rows: Tensor, units: int) -> Tensor:
    """Sum the block of rows that belongs to each unit: ``[units * n] -> [units]``."""
    return rows.view(units, -1).sum(1)


def l1_norms(decoder: Decoder) -> Scores:
    """Return ‖W_u‖1 over all weights and biases of each unit, as one tensor ``[units]`` for each layer."""
    return {name: [_l1_norm(layer, structure) for layer in decoder.layers] for name, structure in WIDTHS.items()}


def _l1_norm(layer: Layer, structure: Width) -> Tensor:
    units = structure.units(layer)
    if not units:
        return torch.zeros(0, dtype=torch.float64)
    total = by_unit(structure.output(layer).weight.abs().sum(0, dtype=torch.float64), units)
    for projection in structure.inputs(layer):
        total = total + by_unit(_rows(projection), units)
    return total.cpu()


def _rows(linear: torch.nn.Linear) -> Tensor:
    rows = linear.weight.abs().sum(1, dtype=torch.float64)
    return rows if linear.bias is None else rows + linear.bias.abs().double()
