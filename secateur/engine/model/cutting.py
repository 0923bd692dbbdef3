"""Tensor cutting: a plan is applied by making the weight tensors smaller; no mask remains in the model."""

from collections.abc import Iterator
from contextlib import contextmanager

from secateur.engine.model.decoder import Decoder
from secateur.engine.model.plan import Plan
from secateur.engine.structures import STRUCTURES, WIDTHS
from secateur.engine.structures.caches import number_caches
from secateur.engine.structures.experts import channels_of, tell_config


def apply_plan(decoder: Decoder, plan: Plan) -> None:
    """Cut every layer in place to the units that ``plan`` keeps.

    The indices in ``plan`` count the units of the model *as it is now*.
    """
    for layer, kept in zip(decoder.layers, plan.layers, strict=True):
        kept = dict(kept)
        if "experts" in kept and "channels" in kept:  # channels are counted over all experts that there are
            width = WIDTHS["channels"].units(layer) // STRUCTURES["experts"].units(layer)
            places = {channel: place for place, channel in enumerate(channels_of(kept["experts"], width))}
            kept["channels"] = tuple(places[channel] for channel in kept["channels"])
        for name, structure in STRUCTURES.items():
            if name in kept:
                structure.cut(layer, kept[name])
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
    _pad(decoder)
    try:
        yield
    finally:
        for layer, units in zip(decoder.layers, before, strict=True):
            for name, structure in WIDTHS.items():
                experts = structure.experts(layer)
                own, wide = units[name] // experts, structure.units(layer) // experts
                structure.cut(layer, [expert * wide + unit for expert in range(experts) for unit in range(own)])


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
