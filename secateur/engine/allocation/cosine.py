"""SlimLLM's layer ratios: a layer that hardly turns the hidden states gives more (Guo et al., section 4.4)."""

import math
from collections.abc import Sequence

from secateur.engine.allocation.base import LayerLimit, Share, fill, layer_parameters
from secateur.engine.scoring.base import Context

# Equation 11's α and the share of layers that is skipped, at the two ratios the authors give them for.
LOW, HIGH = 0.2, 0.5
ALPHAS = (10.0, 7.0)
SKIPPED = (6 / 32, 2 / 32)
DEEP = 8
"""Layers from which on the first and the last are kept: in a shallower model too little is left to give for them."""


def allocate(context: Context, limits: Sequence[LayerLimit], total: float) -> Share:
    """r_l = r_0·softmax(α·E[cos(x_l, x_l+1)]), r_0 solved so that the whole meets the target (equation 11).

    The first layer and the last of a deep model give nothing, nor do those that turn the hidden states most, unless the others cannot
    do alone; their number and α go with the target ratio, between the authors' two settings on a line.
    """
    ratio = context.target_ratio
    between = min(max((ratio - LOW) / (HIGH - LOW), 0.0), 1.0)
    alpha = context.resolved.spec.allocation.alpha
    if alpha is None:
        alpha = _between(ALPHAS, between)
    cosines = context.forward_statistics.cosines
    context.details["sensitivity"] = [1 - cosine for cosine in cosines]
    count = len(cosines)
    kept = {0, count - 1} if count >= DEEP else set()
    for index in sorted(range(count), key=cosines.__getitem__):
        if len(kept) < round(_between(SKIPPED, between) * count):
            kept.add(index)
    weights = [
        0.0 if index in kept else size * math.exp(alpha * cosine)
        for index, (size, cosine) in enumerate(zip(layer_parameters(context), cosines, strict=True))
    ]
    return Share(fill(weights, [limit.parameters for limit in limits], total))


def _between(ends: tuple[float, float], share: float) -> float:
    return ends[0] + (ends[1] - ends[0]) * share
