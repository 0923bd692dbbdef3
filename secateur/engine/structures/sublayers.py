"""Attention and feed-forward as structures: one sub-layer of a block leaves, and the other stays.

In memory, and in the layout ``per-layer``, a module without parameters stands in for the sub-layer. Where the stock
class must hold the sub-layer, it has one unit, and the output of that unit is zero.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

import torch

from secateur.catalog.architectures import Family
from secateur.engine.model.absent import Absent
from secateur.engine.model.decoder import Decoder, Layer
from secateur.engine.structures.base import Width
from secateur.engine.structures.caches import number_caches
from secateur.engine.structures.channels import Channels
from secateur.engine.structures.kv_groups import KVGroups

SubLayer = Literal["attention", "feed_forward"]
UNITS: dict[SubLayer, Width] = {"attention": KVGroups(), "feed_forward": Channels()}
"""The units that each sub-layer is made of."""


def modules(family: Family, sublayer: SubLayer) -> tuple[str, ...]:
    """Return the names of the modules of a block that make up the sub-layer: one, or in OPT two projections."""
    names = (
        (*family.attention_inputs, family.attention_output)
        if sublayer == "attention"
        else (*family.channel_inputs, family.channel_output)
    )
    return tuple(dict.fromkeys(name.partition(".")[0] for name in names))


def is_absent(layer: Layer, sublayer: SubLayer) -> bool:
    return isinstance(layer.module.get_submodule(modules(layer.family, sublayer)[0]), Absent)


@contextmanager
def without(layer: Layer, sublayer: SubLayer) -> Iterator[None]:
    """Let the sub-layer add nothing to the hidden states while the context lasts; its weights are not changed."""
    _stand_in(layer, sublayer)
    try:
        yield
    finally:
        _restore(layer, sublayer)


@torch.no_grad()
def cut(decoder: Decoder, index: int, sublayer: SubLayer) -> None:
    """Remove the sub-layer of block ``index``, which :func:`removable` lists."""
    layer, units = decoder.layers[index], UNITS[sublayer]
    count = units.units(layer)
    units.cut(layer, range(0, count, count // units.experts(layer)))
    output = units.output(layer)
    output.weight.zero_()
    if output.bias is not None:
        output.bias.zero_()
    _stand_in(layer, sublayer)
    number_caches(decoder)


def removable(decoder: Decoder, sublayer: SubLayer) -> list[int]:
    """Return the blocks that can lose the sub-layer.

    One block of each kind of attention (the config's ``layer_types``) keeps its attention, because a KV cache counts
    its tokens there. A block does not lose both sub-layers: it would be a block that can leave as a whole.
    """
    other: SubLayer = "feed_forward" if sublayer == "attention" else "attention"
    kinds = getattr(decoder.model.config, "layer_types", None) or [""] * len(decoder.layers)
    having = [index for index, layer in enumerate(decoder.layers) if not is_absent(layer, sublayer)]
    last = {
        index
        for index in having
        if sublayer == "attention" and [kinds[each] for each in having].count(kinds[index]) == 1
    }
    return [index for index in having if index not in last and not is_absent(decoder.layers[index], other)]


@contextmanager
def held(decoder: Decoder) -> Iterator[None]:
    """Put a sub-layer of one unit with zero output in each place of a removed one, while the context lasts.

    The model computes the same, and its class is the stock one.
    """
    absent: list[tuple[Layer, SubLayer]] = [
        (layer, sublayer) for layer in decoder.layers for sublayer in UNITS if is_absent(layer, sublayer)
    ]
    for layer, sublayer in absent:
        _restore(layer, sublayer)
        layer.tell_sizes()
    number_caches(decoder)
    try:
        yield
    finally:
        for layer, sublayer in absent:
            _stand_in(layer, sublayer)
        number_caches(decoder)


def absent_modules(decoder: Decoder) -> dict[str, list[str]]:
    """Return the modules that are absent, by the number of the block, for the config of the layout ``per-layer``."""
    found = {
        str(index): [
            name for sublayer in UNITS if is_absent(layer, sublayer) for name in modules(decoder.shape.family, sublayer)
        ]
        for index, layer in enumerate(decoder.layers)
    }
    return {index: names for index, names in found.items() if names}


def _stand_in(layer: Layer, sublayer: SubLayer) -> None:
    for name in modules(layer.family, sublayer):
        layer.module.set_submodule(name, Absent(layer.module.get_submodule(name), sublayer == "attention"))


def _restore(layer: Layer, sublayer: SubLayer) -> None:
    for name in modules(layer.family, sublayer):
        absent = layer.module.get_submodule(name)
        assert isinstance(absent, Absent)
        layer.module.set_submodule(name, absent.stock)
