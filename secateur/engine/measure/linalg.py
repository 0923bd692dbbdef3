"""Linear algebra that scoring and layer-wise recovery share."""

import torch
from torch import Tensor

from secateur.contract.errors import ErrorCode, PruningError


def damped(gram: Tensor, damping: float) -> tuple[Tensor, Tensor]:
    """Return the Cholesky factor of gram + λ·mean(diag)·I, and the added λ·mean(diag).

    λ is ``damping``, or more when rounding errors make the factorization fail.

    Raises:
        PruningError: ``loss_not_finite`` when ``gram`` is not finite.
    """
    size = gram.diagonal().mean().clamp_min(1e-12)
    if not size.isfinite():  # a Gram matrix overflows on its diagonal first; no damping could repair it
        raise PruningError(
            ErrorCode.LOSS_NOT_FINITE,
            "Hidden states overflow in this dtype. Try dtype 'bfloat16' or 'float32'.",
            field="dtype",
        )
    while True:
        added = damping * size
        matrix = gram.clone()
        matrix.diagonal().add_(added)
        factor, failed = torch.linalg.cholesky_ex(matrix)
        if not failed:
            return factor, added
        damping = max(10 * damping, 1e-6)
