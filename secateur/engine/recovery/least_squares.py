"""Refit an output projection exactly, from second moments, to the output that its structure should have."""

import torch
from torch import Tensor

from secateur.catalog.methods import DAMPING
from secateur.engine.measure.linalg import damped
from secateur.engine.recovery.base import Cut

CARRIED = 0.35
"""Share of the loss of earlier layers that a structure has to make up for.

On the calibration text a share of 1 would be best. But hidden states of layers that are fitted to the calibration text
are nearer to their targets on that text than on any other text.
"""


def recover(cut: Cut) -> tuple[Tensor, Tensor | None]:
    """Return the weight that :func:`refit` computes, and the bias unchanged."""
    return refit(cut.weight, cut.moments.gram, cut.kept, cut.moments.missing, cut.damping), cut.bias


def refit(
    weight: Tensor, gram: Tensor, kept: Tensor, missing: Tensor | None = None, damping: float = DAMPING
) -> Tensor:
    """Return W' = argmin Σ w·‖W·x + c·e − W'·x_kept‖² + λ·mean(diag G)·‖W' − W_kept‖², ``[out, kept]``.

    ``weight`` is W ``[out, in]``, ``gram`` is Σ w·x·xᵀ ``[in, in]``, whose kept part is G, and ``missing`` is Σ w·x·eᵀ
    ``[in, out]``. If ``missing`` is ``None``, e is 0. The factor c is :data:`CARRIED`, and λ is ``damping``.
    """
    wanted = gram[kept] @ weight.T
    if missing is not None:
        wanted = wanted + CARRIED * missing[kept]
    factor, added = damped(gram[kept][:, kept], damping)
    return torch.cholesky_solve(wanted + added * weight[:, kept].T, factor).T.contiguous()
