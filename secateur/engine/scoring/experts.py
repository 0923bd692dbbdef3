"""Score whole experts of mixtures by what their router sends them, in one forward pass over the calibration tokens.

Each scorer returns float64 scores ``[experts]`` on the CPU, one tensor for each layer; the tensor of a layer without a
mixture of experts is empty. Within a layer, the experts with the lowest scores are removed first.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from secateur.engine.measure.gates import Progress
from secateur.engine.model.decoder import Decoder
from secateur.engine.scoring.base import Context
from secateur.engine.structures.experts import units


@dataclass(frozen=True)
class Routing:
    """What the router of one layer sent to each expert, as float64 sums ``[experts]`` over tokens on the CPU."""

    sent: Tensor
    """Number of tokens that were sent to the expert."""
    given: Tensor
    """Sum over these tokens of the router's weight times the L2 norm of the expert's output."""


@torch.no_grad()
def routing(decoder: Decoder, tokens: Tensor, batch_windows: int, progress: Progress) -> list[Routing]:
    """Return the routing of every layer for ``tokens`` ``[windows, length]``, from one forward pass.

    Each expert runs only on the tokens that are sent to it. A weight is what the class multiplies an expert's output
    by: after the choice of the experts, and normalised if the class normalises.
    """
    counts = [units(layer) for layer in decoder.layers]
    found = [Routing(*torch.zeros(2, count, dtype=torch.float64)) for count in counts]

    def watch(own: Routing, expert: int, weights: Tensor, outputs: Tensor) -> None:
        own.sent[expert] += len(weights)
        own.given[expert] += float((weights.double() * outputs.float().norm(dim=1).double()).sum())

    mixtures = [layer.mixture for layer in decoder.layers]
    try:
        for mixture, own in zip(mixtures, found, strict=True):
            if mixture is not None:
                mixture.watch = partial(watch, own)
        with decoder.routed():
            batches, hidden = decoder.enter_batches(tokens, batch_windows)
            for index in range(len(decoder.layers)):
                decoder.run_batches(batches, index, hidden)
                progress((index + 1) / len(decoder.layers))
    finally:
        for mixture in mixtures:
            if mixture is not None:
                mixture.watch = None
    return found


def reap(context: Context) -> list[Tensor]:
    """Return the mean, over the tokens sent to an expert, of the router's weight times the norm of the expert's output.

    This is REAP's saliency S_j = 1/|X_j| · Σ_{x ∈ X_j} g_j(x)·‖f_j(x)‖₂, equation 9 of "REAP the Experts: Why Pruning
    Prevails for One-Shot MoE Compression" (Lasby et al., 2025, arXiv 2510.13999). X_j are the tokens for which expert j
    is among the chosen ones. The score of an expert to which no token is sent is 0.
    """
    return [own.given / own.sent.clamp_min(1) for own in _routing(context)]


def frequency(context: Context) -> list[Tensor]:
    """Return the share of all calibration tokens that is sent to each expert."""
    return [own.sent / context.tokens.numel() for own in _routing(context)]


def random(context: Context) -> list[Tensor]:
    """Return independent uniform scores, which the seed and the numbers of experts determine."""
    generator = torch.Generator().manual_seed(context.seed)
    counts = [units(layer) for layer in context.decoder.layers]
    return [torch.rand(count, generator=generator, dtype=torch.float64) for count in counts]


def _routing(context: Context) -> list[Routing]:
    """Return the routing of every layer, which the scorers share."""

    def compute() -> list[Tensor]:
        found = routing(context.decoder, context.tokens, context.batch_windows, context.progress)
        return [tensor for own in found for tensor in (own.sent, own.given)]

    tensors = context.memo("routing", compute)
    return [Routing(*tensors[start : start + 2]) for start in range(0, len(tensors), 2)]


EXPERT_SCORERS: dict[str, Callable[[Context], list[Tensor]]] = {"frequency": frequency, "random": random, "reap": reap}
"""Scorers of whole experts by name."""
