"""FLAP's adaptive structure: one threshold over the scores of all units of all layers."""

from collections.abc import Sequence

import torch
from torch import Tensor

from secateur.catalog.architectures import nearest_groups
from secateur.engine.allocation.base import LayerLimit, Share
from secateur.engine.scoring.base import Context


def allocate(context: Context, limits: Sequence[LayerLimit], total: float) -> Share:
    """The lowest-scored units of the whole model go, each for what it weighs, until ``total`` is gone (An et al., section 3.3).

    Scores must be comparable between layers and between heads and channels, as FLAP's standardised ones are. KV groups too
    large for what is left are passed over, as long as channels can make up for them.
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
    """Score and layer of all units that may go, the lowest first; what experts give together scores their mean."""
    return sorted(
        (score, layer)
        for layer, (values, count) in enumerate(zip(scores, most, strict=True))
        for score in torch.sort(values.view(experts, -1)).values.mean(0)[:count].tolist()
    )
