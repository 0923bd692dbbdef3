"""Secateur's allocation: heads and channels of all layers compete, by what each would cost the model's predictions."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from workers.engine.allocation.base import LayerLimit, Share, fill
from workers.engine.decoder import PARTS, Part
from workers.engine.recovery.least_squares import refit
from workers.engine.scoring.base import Context
from workers.engine.scoring.second_order import eliminate
from workers.engine.slicing import expand
from workers.engine.sweep import Sweep

CURVE_WINDOWS = 8
"""Calibration windows that error curves are taken on: their shape needs fewer tokens than a fit."""
PROBE_TOKENS = 256
"""Tokens that divergences are taken on: every layer's parts cost a forward of them."""
PROBE_SHARE = 0.5
"""Units that a part gives when its sensitivity is probed."""
BISECTIONS = 60


def allocate(context: Context, limits: Sequence[LayerLimit], total: float) -> Share:
    """Minimise Σ s·err over layers and parts under Σ parameters = ``total``: one price on parameters, which all pay.

    err is the relative squared error that a part leaves in the residual stream when its best units stay and are refitted
    (:func:`workers.engine.scoring.second_order.eliminate`), s the divergence of the model's predictions for that error,
    measured by cutting the part alone.
    """
    cost = context.decoder.shape.cost
    limit: dict[Part, list[int]] = {
        "heads": [layer.kv_groups for layer in limits],
        "channels": [layer.channels for layer in limits],
    }
    price: dict[Part, int] = {"heads": cost.kv_group, "channels": cost.channel}
    curves = context.memo("loss-curves", lambda: _curves(context))
    by_part = {part: curves[number :: len(PARTS)] for number, part in enumerate(PARTS)}

    def given(rate: float) -> dict[Part, list[int]]:
        """Units that each layer's part gives when a removed parameter is worth ``rate`` nats."""
        return {
            part: [
                int((curve[: most + 1] - rate * price[part] * torch.arange(most + 1)).argmin())
                for curve, most in zip(by_part[part], limit[part], strict=True)
            ]
            for part in PARTS
        }

    def parameters(units: dict[Part, list[int]]) -> float:
        return float(sum(price[part] * sum(units[part]) for part in PARTS))

    low, high = 0.0, max(float(curve.max()) for curve in curves) + 1.0
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        low, high = (middle, high) if parameters(given(middle)) <= total else (low, middle)
    units = given(low)
    channels = [count * float(cost.channel) for count in units["channels"]]
    room = [most * cost.channel - taken for most, taken in zip(limit["channels"], channels, strict=True)]
    missing = total - parameters(units)
    more = fill([min(taken + cost.channel, left) for taken, left in zip(channels, room, strict=True)], room, missing)
    budgets = [
        groups * cost.kv_group + taken + added
        for groups, taken, added in zip(units["heads"], channels, more, strict=True)
    ]
    return Share(budgets, units["heads"])


@torch.no_grad()
def _curves(context: Context) -> list[Tensor]:
    """By layer and part, the divergence in nats a token that removing 0, 1, 2… units would cost: ``[units + 1]``."""
    decoder, tokens = context.decoder, context.tokens
    probe = tokens[: max(1, PROBE_TOKENS // tokens.shape[1])]
    captured = decoder.capture(probe)
    before = decoder.resume(captured, 0, captured.inputs[0]).float().log_softmax(-1)
    sweep = Sweep(decoder, tokens[:CURVE_WINDOWS], context.batch_windows, decoder)
    curves = []
    for index, layer in enumerate(sweep.layers()):
        for part in PARTS:
            moments, output, units = sweep.moments(part), layer.output(part), layer.units(part)
            width = layer.width(part)
            path = eliminate(output.weight.float(), moments.gram, width, units - 1)
            errors = torch.cat([torch.zeros(1), path.errors.cumsum(0)]).double()
            probed = max(1, round(PROBE_SHARE * units)) if units > 1 else 0
            kept = torch.tensor(sorted(set(range(units)) - set(path.order[:probed].tolist())))
            inputs = expand(kept.to(output.weight.device), width)
            weight = torch.zeros_like(output.weight)
            weight[:, inputs] = refit(output.weight.float(), moments.gram, inputs).to(weight.dtype)
            with _replaced(output, weight):
                after = decoder.resume(captured, index, captured.inputs[index]).float().log_softmax(-1)
            divergence = float((before.exp() * (before - after)).sum(-1).double().mean().clamp_min(0))
            curves.append(errors * (divergence / float(errors[probed].clamp_min(1e-30))))
        context.progress((index + 1) / len(decoder.layers))
    return curves


@contextmanager
def _replaced(linear: nn.Linear, weight: Tensor) -> Iterator[None]:
    own, linear.weight = linear.weight, nn.Parameter(weight, requires_grad=False)
    try:
        yield
    finally:
        linear.weight = own
