"""Secateur's allocation: heads and channels of all layers compete, by what each would cost the model's predictions."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from app.catalog.architectures import nearest_groups
from workers.engine.allocation.base import LayerLimit, Share, fill
from workers.engine.decoder import PARTS, Decoder, Part
from workers.engine.recovery.least_squares import refit
from workers.engine.scoring.base import Context
from workers.engine.scoring.second_order import eliminate
from workers.engine.slicing import expand
from workers.engine.sweep import Sweep

CURVE_WINDOWS = 6
"""Calibration windows that error curves are taken on: their shape needs fewer tokens than a fit."""
PROBE_TOKENS = 128
"""Tokens that divergences are taken on: every layer's parts cost a forward of them."""
PROBE_SHARE = 0.5
"""Units that a part gives when its sensitivity is probed."""
PROBE_CHUNK = 32
"""Tokens whose predictions are compared at a time: those of all take more memory than a layer."""
BISECTIONS = 60


def allocate(context: Context, limits: Sequence[LayerLimit], total: float) -> Share:
    """Minimise Σ s·err over layers and parts under Σ parameters = ``total``: one price on parameters, which all pay.

    err is the relative squared error that a part leaves in the residual stream when its best units stay and are refitted
    (:func:`workers.engine.scoring.second_order.eliminate`), s the divergence of the model's predictions for that error,
    measured by cutting the part alone.
    """
    cost = context.decoder.shape.cost
    curves = context.memo("loss-curves", lambda: _curves(context))
    heads = [curve[: limit.kv_groups + 1] for curve, limit in zip(curves[0::2], limits, strict=True)]
    channels = [curve[: limit.channels + 1] for curve, limit in zip(curves[1::2], limits, strict=True)]
    prices = [cost.kv_group] * len(heads) + [cost.channel] * len(channels)
    groups = _cheapest(heads + channels, prices, total)[: len(heads)]
    most = sum(limit.kv_groups for limit in limits), sum(limit.channels for limit in limits)
    while sum(groups) != (count := nearest_groups(sum(groups), range(most[0] + 1), most[1], total, cost)):
        step = 1 if sum(groups) < count else -1
        groups[_cheapest_step(heads, groups, step)] += step
    left = total - sum(groups) * cost.kv_group
    given = [count * float(cost.channel) for count in _cheapest(channels, prices[len(heads) :], left)]
    room = [limit.channels * cost.channel - taken for limit, taken in zip(limits, given, strict=True)]
    rest = min(max(left - sum(given), 0.0), sum(room))
    more = fill([min(taken + cost.channel, open_) for taken, open_ in zip(given, room, strict=True)], room, rest)
    budgets = [count * cost.kv_group + taken + added for count, taken, added in zip(groups, given, more, strict=True)]
    return Share(budgets, groups)


def _cheapest(curves: list[Tensor], prices: list[int], total: float) -> list[int]:
    """Units off each curve that cost least together, for no more than ``total`` parameters: one price on parameters."""
    low, high = 0.0, sum(float(curve.max()) for curve in curves) + 1.0
    units = [0] * len(curves)
    for _ in range(BISECTIONS):
        rate = (low + high) / 2
        tried = [
            int((curve - rate * price * torch.arange(len(curve))).argmin())
            for curve, price in zip(curves, prices, strict=True)
        ]
        if sum(count * price for count, price in zip(tried, prices, strict=True)) <= total:
            low, units = rate, tried
        else:
            high = rate
    return units


def _cheapest_step(curves: list[Tensor], units: list[int], step: int) -> int:
    """The curve on which going one unit up or down costs least."""
    open_ = [index for index, curve in enumerate(curves) if 0 <= units[index] + step < len(curve)]
    return min(open_, key=lambda index: float(curves[index][units[index] + step] - curves[index][units[index]]))


@torch.no_grad()
def _curves(context: Context) -> list[Tensor]:
    """By layer and part, the divergence in nats a token that removing 0, 1, 2… units would cost: ``[units]``."""
    decoder, tokens = context.decoder, context.tokens
    probe = _Probe(decoder, tokens[: max(1, PROBE_TOKENS // tokens.shape[1]), :PROBE_TOKENS])
    sweep = Sweep(decoder, tokens[:CURVE_WINDOWS], context.batch_windows, decoder)
    curves = []
    for index, layer in enumerate(sweep.layers(cut=False)):
        for part in PARTS:
            moments, output, units = sweep.moments(part), layer.output(part), layer.units(part)
            path = eliminate(output.weight.float(), moments.gram, layer.width(part), units - 1)
            errors = torch.cat([torch.zeros(1), path.errors.cumsum(0)]).double()
            gone = path.order[: max(1, round(PROBE_SHARE * units))]
            divergence = probe.divergence(index, part, moments.gram, gone)
            curves.append(errors * (divergence / float(errors[len(gone)].clamp_min(1e-30))))
        context.progress((index + 1) / len(decoder.layers))
    return curves


class _Probe:
    """How far the predictions for ``tokens`` ``[windows, length]`` move when one part of the model is cut."""

    def __init__(self, decoder: Decoder, tokens: Tensor) -> None:
        self._decoder = decoder
        self._captured = decoder.capture(tokens)
        self._before = decoder.head(self._leaving(len(decoder.layers) - 1)).flatten(0, 1)

    def divergence(self, index: int, part: Part, gram: Tensor, gone: Tensor) -> float:
        """Kullback-Leibler divergence in nats a token without the units ``gone`` of layer ``index``, the rest refitted."""
        layer = self._decoder.layers[index]
        output = layer.output(part)
        kept = torch.tensor(sorted(set(range(layer.units(part))) - set(gone.tolist())), device=output.weight.device)
        inputs = expand(kept, layer.width(part))
        weight = torch.zeros_like(output.weight)
        weight[:, inputs] = refit(output.weight.float(), gram, inputs).to(weight.dtype)
        with _replaced(output, weight):
            leaving = self._leaving(index).flatten(0, 1)
        pairs = zip(self._before.split(PROBE_CHUNK), leaving.split(PROBE_CHUNK), strict=True)
        total = sum(float(_divergence(whole, self._decoder.head(cut))) for whole, cut in pairs)
        return max(total / len(leaving), 0.0)

    def _leaving(self, index: int) -> Tensor:
        """The last layer, from what entered layer ``index``: ``[windows, length, hidden]``."""
        return self._decoder.run_layers(self._captured, index, self._captured.inputs[index])


def _divergence(before: Tensor, after: Tensor) -> Tensor:
    """Σ over tokens of KL(before ‖ after) for logits ``[tokens, vocabulary]``."""
    before, after = before.float().log_softmax(-1), after.float().log_softmax(-1)
    return (before.exp() * (before - after)).sum(-1).double().sum()


@contextmanager
def _replaced(linear: nn.Linear, weight: Tensor) -> Iterator[None]:
    own, linear.weight = linear.weight, nn.Parameter(weight, requires_grad=False)
    try:
        yield
    finally:
        linear.weight = own
