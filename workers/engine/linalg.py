"""Linear algebra that scorers and fits share."""

import torch
from torch import Tensor


def damped(gram: Tensor, damping: float) -> tuple[Tensor, Tensor]:
    """Cholesky factor of gram + λ·mean(diag)·I, and the λ·mean(diag) that it took: more where rounding asks for it."""
    size = gram.diagonal().mean().clamp_min(1e-12)
    while True:
        added = damping * size
        matrix = gram.clone()
        matrix.diagonal().add_(added)
        factor, failed = torch.linalg.cholesky_ex(matrix)
        if not failed:
            return factor, added
        damping = max(10 * damping, 1e-6)
