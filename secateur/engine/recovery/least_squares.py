"""The exact refit of an output projection to what its structure should give, from second moments."""

import torch
from torch import Tensor

from secateur.catalog.methods import DAMPING
from secateur.engine.measure.linalg import damped
from secateur.engine.recovery.base import Cut

CARRIED = 0.35
"""How much of what earlier layers lost a structure is asked to make up for. On the calibration text all of it would be best; but
hidden states of layers fitted to that text are nearer to their targets there than anywhere else."""


def recover(cut: Cut) -> tuple[Tensor, Tensor | None]:
    """:func:`refit`; the bias stays as it is."""
    return refit(cut.weight, cut.moments.gram, cut.kept, cut.moments.missing, cut.damping), cut.bias


def refit(
    weight: Tensor, gram: Tensor, kept: Tensor, missing: Tensor | None = None, damping: float = DAMPING
) -> Tensor:
    """W' = argmin Σ w·‖W·x + c·e − W'·x_kept‖² + λ·mean(diag G)·‖W' − W_kept‖², ``[out, kept]``.

    ``weight`` is W ``[out, in]``, ``gram`` Σ w·x·xᵀ ``[in, in]``, whose kept part is G, ``missing`` Σ w·x·eᵀ ``[in, out]``
    (none: e is 0), c is :data:`CARRIED`, λ the damping.
    """
    wanted = gram[kept] @ weight.T
    if missing is not None:
        wanted = wanted + CARRIED * missing[kept]
    factor, added = damped(gram[kept][:, kept], damping)
    return torch.cholesky_solve(wanted + added * weight[:, kept].T, factor).T.contiguous()
