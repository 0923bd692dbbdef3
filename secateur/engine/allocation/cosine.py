"""Allocate by SlimLLM's layer ratios (Guo et al., section 4.4).

More is removed from a layer that hardly changes the direction of the hidden states.
"""

import math
from collections.abc import Sequence

from secateur.engine.allocation.base import LayerLimit, Share, fill, layer_parameters
from secateur.engine.scoring.base import Context

# The authors give equation 11's α and the share of layers that are skipped at these two ratios.
LOW, HIGH = 0.2, 0.5
ALPHAS = (10.0, 7.0)
SKIPPED = (6 / 32, 2 / 32)
DEEP = 8
"""Number of layers from which on the first and the last layer are kept.

In a shallower model, the other layers have too few parameters to remove in their place.
"""


def allocate(context: Context, limits: Sequence[LayerLimit], total: float) -> Share:
    """Return r_l = r_0·softmax(α·E[cos(x_l, x_l+1)]), with r_0 solved so that the whole meets the goal (equation 11).

    Nothing is removed from the first and the last layer of a deep model, nor from the layers that change the direction
    of the hidden states most, unless the other layers have too few parameters to remove. The number of skipped layers
    and α are interpolated linearly between the authors' two settings by the requested ratio.
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
