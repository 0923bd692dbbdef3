"""Tensor cutting: a plan is applied by making the weight tensors smaller; no mask remains in the model."""

from collections.abc import Iterator
from contextlib import contextmanager

from secateur.engine.model.decoder import Decoder
from secateur.engine.model.plan import Plan
from secateur.engine.structures import STRUCTURES, WIDTHS
from secateur.engine.structures.caches import number_caches
from secateur.engine.structures.experts import tell_config


def apply_plan(decoder: Decoder, plan: Plan) -> None:
    """Cut every layer in place to the units that ``plan`` keeps.

    The indices in ``plan`` count the units of the model *as it is now*.
    """
    for layer, kept in zip(decoder.layers, plan.layers, strict=True):
        kept, sizes = dict(kept), layer.shape
        for name in (name for name in STRUCTURES if name in kept):
            structure = STRUCTURES[name]
            for other, before in structure.held(layer, kept[name]).items():
                if other in kept:  # the plan counts these units as before the cut of those that hold them
                    places = {unit: place for place, unit in enumerate(before)}
                    kept[other] = tuple(places[unit] for unit in kept[other])
            structure.cut(layer, kept[name])
        if layer.shape != sizes:
            decoder.hold(layer)
    number_caches(decoder)
    tell_config(decoder)


@contextmanager
def padded(decoder: Decoder, *, enabled: bool = True) -> Iterator[None]:
    """Pad every layer with zero units to the widths of the widest layer while the context lasts.

    The model's output does not change. KV groups are padded further when the stock class does not allow their number.
    With ``enabled`` false, nothing changes.
    """
    if not enabled:
        yield
        return
    before = [{name: structure.units(layer) for name, structure in WIDTHS.items()} for layer in decoder.layers]
    try:
        _pad(decoder)
        yield
    finally:
        for layer, units in zip(decoder.layers, before, strict=True):
            for name, structure in WIDTHS.items():
                experts = structure.experts(layer)
                own, wide = units[name] // experts, structure.units(layer) // experts
                structure.cut(layer, [expert * wide + unit for expert in range(experts) for unit in range(own)])
            decoder.hold(layer)


def _pad(decoder: Decoder) -> None:
    shape, stock = decoder.shape, decoder.shape.stock_layer
    most = max(layer.kv_groups for layer in decoder.widths)
    fewer = (stock.without(gone) for gone in range(stock.kv_groups - most, -1, -1))
    units = {
        "kv_groups": next(layer.kv_groups for layer in fewer if shape.takes_heads(layer)),
        "channels": max(layer.channels_per_expert for layer in decoder.widths),
    }
    for layer in decoder.layers:
        for name, structure in WIDTHS.items():
            structure.pad(layer, units[name])
        decoder.hold(layer)
