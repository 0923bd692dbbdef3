"""Score whole units by the optimal brain surgeon: the output error that remains after the kept units compensate.

The source is Hassibi and Stork 1993; for whole units, Kurtic et al. 2023 (ZipLM, equations 2 and 3). W (``[out, in]``)
is a structure's output projection, and G is the Gram matrix of its inputs. Without the inputs S, the refitted rest has
the error tr(W_S·(H⁻¹_SS)⁻¹·W_Sᵀ), where H = G + λ·mean(diag G)·I.
"""

import torch
from torch import Tensor

from secateur.engine.measure.linalg import damped
from secateur.engine.scoring.moments import UnitContext
from secateur.engine.structures import expand

DAMPING = 0.1
"""Damping λ, as a share of the mean diagonal.

Damping keeps the choice of units from relying on correlations that few tokens cannot show.
"""
STEPS = 24
"""Single inputs are removed ``units // STEPS`` at a time, but at least one.

The inputs of one step are chosen together.
"""


def score(context: UnitContext) -> Tensor:
    """Return scores that rank removed units in the order of their removal; kept units share the highest score."""
    order = eliminate(
        context.output_weight, context.moments.gram, context.structure.width(context.layer), context.removed
    )
    scores = torch.full((context.units,), float(context.removed))
    scores[order] = torch.arange(float(len(order)))
    return scores


def eliminate(weight: Tensor, gram: Tensor, width: int, count: int) -> Tensor:
    """Remove ``count`` units of ``width`` inputs greedily, and refit the remaining units after each step.

    ``weight`` is ``[out, in]`` and ``gram`` is ``[in, in]``, both float32. Blocks of inputs are removed one by one,
    single inputs several at a time. The units are returned in the order of their removal, ``[count]``. Beside the
    arguments, memory holds two matrices ``[in, in]`` and one ``[in, out]``.
    """
    inverse = torch.cholesky_inverse(damped(gram, DAMPING)[0])
    columns = weight.T.clone(memory_format=torch.contiguous_format)  # [in, out]
    units = len(columns) // width
    at_once = max(1, units // STEPS) if width == 1 else 1
    present = torch.ones(units, dtype=torch.bool, device=weight.device)
    order: list[Tensor] = []
    while count > 0:
        losses = _losses(columns, inverse, width).masked_fill(~present, torch.inf)
        gone = losses.argsort(stable=True)[: min(at_once, count)]
        rows = expand(gone, width)
        across, wanted = inverse[:, rows], torch.cat([columns[rows], inverse[rows]], 1)
        solved = torch.linalg.solve(across[rows], wanted)
        columns.addmm_(across, solved[:, : columns.shape[1]], alpha=-1)
        inverse.addmm_(across, solved[:, columns.shape[1] :], alpha=-1)
        # The sums leave rounding errors where a removed unit has nothing left; its block of the inverse must not be singular.
        columns[rows], inverse[rows], inverse[:, rows] = 0.0, 0.0, 0.0
        inverse[rows, rows] = 1.0
        present[gone] = False
        order.append(gone)
        count -= len(gone)
    return torch.cat(order).cpu() if order else torch.empty(0, dtype=torch.long)


def _losses(columns: Tensor, inverse: Tensor, width: int) -> Tensor:
    """Return the error that the removal of each unit alone causes: ``[units]``."""
    if width == 1:
        squares: Tensor = torch.linalg.vector_norm(columns, dim=1).square()
        return squares / inverse.diagonal()
    units = len(columns) // width
    blocks = inverse.view(units, width, units, width).diagonal(dim1=0, dim2=2).movedim(-1, 0)
    grouped = columns.view(units, width, -1)
    errors: Tensor = (grouped * torch.linalg.solve(blocks, grouped)).sum((1, 2))
    return errors
