"""Optimal brain surgeon over whole units: what the output loses when a unit goes and all that stay make up for it.

Hassibi and Stork 1993; for whole units Kurtic et al. 2023 (ZipLM, equations 2 and 3). A structure's output projection W
(``[out, in]``) on inputs with Gram matrix G: without the inputs S, the refitted rest is off by
tr(W_S·(H⁻¹_SS)⁻¹·W_Sᵀ), H = G + λ·mean(diag G)·I.
"""

import torch
from torch import Tensor

from secateur.engine.measure.linalg import damped
from secateur.engine.scoring.moments import UnitContext

DAMPING = 0.1
"""λ, as a share of the mean diagonal: keeps the choice from trusting correlations that few tokens cannot show."""
STEPS = 24
"""Single inputs go in this many steps at most from all to none: those of one step are chosen together."""


def score(context: UnitContext) -> Tensor:
    """Units that go first are lowest; those that stay share the highest score."""
    order = eliminate(
        context.output_weight, context.moments.gram, context.layer.width(context.structure), context.removed
    )
    scores = torch.full((context.units,), float(context.removed))
    scores[order] = torch.arange(float(len(order)))
    return scores


def eliminate(weight: Tensor, gram: Tensor, width: int, count: int) -> Tensor:
    """Remove ``count`` units of ``width`` inputs greedily, the rest being refitted after each step.

    Returns the units in the order in which they go, ``[count]``.

    ``weight`` ``[out, in]``, ``gram`` ``[in, in]``; all float32. Blocks go one by one, single inputs some at a time.
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
    """Error of removing each unit alone: ``[units]``."""
    if width == 1:
        return columns.square().sum(1) / inverse.diagonal()
    count = len(columns) // width
    blocks = torch.stack([inverse[i * width : (i + 1) * width, i * width : (i + 1) * width] for i in range(count)])
    grouped = columns.view(count, width, -1)
    errors: Tensor = (grouped * torch.linalg.solve(blocks, grouped)).sum((1, 2))
    return errors
