"""Score whole units by the optimal brain surgeon: the output error that remains after the kept units compensate.

The source is Hassibi and Stork 1993; for whole units, Kurtic et al. 2023 (ZipLM, equations 2 and 3). W (``[out, in]``)
is a structure's output projection, and G is the Gram matrix of its inputs. Without the inputs S, the refitted rest has
the error tr(W_S·(H⁻¹_SS)⁻¹·W_Sᵀ), where H = G + λ·mean(diag G)·I.
"""

import torch
from torch import Tensor

from secateur.engine.measure.linalg import damped
from secateur.engine.scoring.moments import UnitContext

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
    single inputs several at a time. The units are returned in the order of their removal, ``[count]``.
    """
    inverse = torch.cholesky_inverse(damped(gram, DAMPING)[0])
    columns = weight.T.clone()  # [in, out]
    units = torch.arange(len(columns) // width, device=weight.device)
    at_once = max(1, len(units) // STEPS) if width == 1 else 1
    order = [units[:0]]
    while count > 0:
        gone = _losses(columns, inverse, width).argsort(stable=True)[: min(at_once, count)]
        stays = torch.ones(len(units), dtype=torch.bool, device=weight.device)
        stays[gone] = False
        rows, rest = stays.logical_not().repeat_interleave(width), stays.repeat_interleave(width)
        block = inverse[rows][:, rows]
        solved = torch.linalg.solve(block, torch.cat([columns[rows], inverse[rows][:, rest]], 1))
        across = inverse[rest][:, rows]
        columns = columns[rest] - across @ solved[:, : columns.shape[1]]
        inverse = inverse[rest][:, rest] - across @ solved[:, columns.shape[1] :]
        order.append(units[gone])
        units, count = units[stays], count - len(gone)
    return torch.cat(order).cpu()


def _losses(columns: Tensor, inverse: Tensor, width: int) -> Tensor:
    """Return the error that the removal of each unit alone causes: ``[units]``."""
    if width == 1:
        return columns.square().sum(1) / inverse.diagonal()
    count = len(columns) // width
    blocks = torch.stack([inverse[i * width : (i + 1) * width, i * width : (i + 1) * width] for i in range(count)])
    grouped = columns.view(count, width, -1)
    errors: Tensor = (grouped * torch.linalg.solve(blocks, grouped)).sum((1, 2))
    return errors
