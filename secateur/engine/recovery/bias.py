"""Compensate as FLAP does: the mean contribution of the removed inputs is added to the bias."""

import torch
from torch import Tensor

from secateur.engine.recovery.base import Cut


def recover(cut: Cut) -> tuple[Tensor, Tensor | None]:
    """Return the kept weight and b' = b + W_removed·E[x_removed] (An et al., equation 8)."""
    removed = torch.ones_like(cut.moments.mean, dtype=torch.bool)
    removed[cut.kept] = False
    lost = cut.weight[:, removed] @ cut.moments.mean[removed]
    return cut.weight[:, cut.kept], lost if cut.bias is None else cut.bias + lost
