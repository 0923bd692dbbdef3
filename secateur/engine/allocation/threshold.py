"""Allocate by FLAP's adaptive structure: one threshold over the scores of all units of all layers."""

from collections.abc import Sequence

import torch
from torch import Tensor

from secateur.catalog.architectures import nearest_groups
from secateur.engine.allocation.base import LayerLimit, Share
from secateur.engine.scoring.base import Context


def allocate(context: Context, limits: Sequence[LayerLimit], total: float) -> Share:
    """Return the shares that remove the lowest-scored units of the whole model (An et al., section 3.3).

    Units are removed until their parameters add up to ``total``. Scores must be comparable between layers and between
    KV groups and channels, as FLAP's standardised scores are. A KV group with more parameters than are left to remove
    is skipped, as long as channels can make up for it.
    """
    assert context.scores is not None
    shape = context.decoder.shape
    cost = shape.cost
    heads = _ascending(context.scores.kv_groups, [limit.kv_groups for limit in limits], 1)
    channels = _ascending(context.scores.channels, [limit.channels for limit in limits], shape.layers[0].experts)
    units = [(score, cost.kv_group, 1) for score, _ in heads] + [(score, cost.channel, 0) for score, _ in channels]
    wished, left = 0, total
    for _, price, is_group in sorted(units):
        if price <= left:
            left -= price
            wished += is_group
    most = sum(limit.kv_groups for limit in limits), sum(limit.channels for limit in limits)
    count = nearest_groups(wished, range(most[0] + 1), most[1], total, cost)
    budgets, groups, left = [0.0] * len(limits), [0] * len(limits), total - count * cost.kv_group
    for _, layer in heads[:count]:
        budgets[layer] += cost.kv_group
        groups[layer] += 1
    for _, layer in channels:
        given = min(max(left, 0.0), cost.channel)
        budgets[layer] += given
        left -= given
    return Share(budgets, groups)


def _ascending(scores: Sequence[Tensor], most: Sequence[int], experts: int) -> list[tuple[float, int]]:
    """Return the score and the layer of all units that may be removed, the lowest score first.

    Channels that experts lose together have the mean of their scores.
    """
    return sorted(
        (score, layer)
        for layer, (values, count) in enumerate(zip(scores, most, strict=True))
        for score in torch.sort(values.view(experts, -1)).values.mean(0)[:count].tolist()
    )
