"""Measure perplexity on held-out windows."""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from secateur.contract.errors import ErrorCode, PruningError
from secateur.engine.model.decoder import Decoder


@torch.no_grad()
def perplexity(decoder: Decoder, tokens: Tensor, batch_windows: int, progress: Callable[[float], None]) -> float:
    """Return exp of the mean next-token loss over ``tokens`` ``[windows, length]``.

    Each window is measured on its own, and windows do not overlap. The loss is computed in float32 and summed in
    float64. The perplexity may be infinite for a badly broken model.

    Raises:
        PruningError: ``loss_not_finite`` when the loss is NaN.
    """
    total, count = 0.0, 0
    for losses in decoder.batch_losses(tokens, batch_windows, progress):
        total, count = total + float(losses.double().sum()), count + losses.numel()
    mean = total / count
    if math.isnan(mean):
        raise PruningError(
            ErrorCode.LOSS_NOT_FINITE,
            "The model's loss is NaN: its activations overflow. Try dtype 'bfloat16' or 'float32'.",
            field="dtype",
        )
    return math.exp(mean) if mean < 700 else math.inf
