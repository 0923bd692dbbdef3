"""Allocate by FLAP's adaptive structure: one threshold over the scores of all units of all layers."""

from collections.abc import Sequence
from itertools import accumulate

import torch
from torch import Tensor

from secateur.catalog.architectures import nearest_amount
from secateur.catalog.structures import WIDTHS
from secateur.engine.allocation.base import LayerLimit, Share
from secateur.engine.scoring.base import Context


def allocate(context: Context, limits: Sequence[LayerLimit], total: float) -> Share:
    """Return the shares that remove the lowest-scored units of the whole model (An et al., section 3.3).

    Units are removed until their parameters add up to ``total``. Scores must be comparable between layers and between
    KV groups and channels, as FLAP's standardised scores are. A KV group with more parameters than are left to remove
    is skipped, as long as channels can make up for it.
    """
    assert context.scores is not None
    shape, layers = context.decoder.shape, [layer.shape for layer in context.decoder.layers]
    prices = {name: [shape.price(name, at, now) for at, now in enumerate(layers)] for name in WIDTHS}
    experts = {"kv_groups": [1] * len(layers), "channels": [layer.experts for layer in layers]}
    heads, channels = (
        _ascending(context.scores[name], [limit.units[name] for limit in limits], experts[name]) for name in WIDTHS
    )
    units = [
        (score, prices[name][layer], name == "kv_groups")
        for name, ascending in zip(WIDTHS, (heads, channels), strict=True)
        for score, layer in ascending
    ]
    wished, left = 0, total
    for _, price, is_group in sorted(units):
        if price <= left:
            left -= price
            wished += price * is_group
    choices = list(accumulate((prices["kv_groups"][layer] for _, layer in heads), initial=0))
    amount = nearest_amount(wished, choices, sum(prices["channels"][layer] for _, layer in channels), total)
    budgets, groups, left = [0.0] * len(limits), [0] * len(limits), total - amount
    for _, layer in heads[: choices.index(amount)]:
        budgets[layer] += prices["kv_groups"][layer]
        groups[layer] += 1
    for _, layer in channels:
        given = min(max(left, 0.0), prices["channels"][layer])
        budgets[layer] += given
        left -= given
    return Share(budgets, {"kv_groups": groups})


def _ascending(scores: Sequence[Tensor], most: Sequence[int], experts: Sequence[int]) -> list[tuple[float, int]]:
    """Return the score and the layer of all units that may be removed, the lowest score first.

    Channels that experts lose together have the mean of their scores.
    """
    return sorted(
        (score, layer)
        for layer, (values, count, parts) in enumerate(zip(scores, most, experts, strict=True))
        for score in torch.sort(values.view(parts, -1)).values.mean(0)[:count].tolist()
    )
