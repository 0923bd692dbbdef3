"""Attention and feed-forward as structures: one sub-layer of a block leaves, and the other stays.

While a model is pruned, a module without parameters stands in for the sub-layer. In the files of the model, in every
layout, the sub-layer has one unit whose output is zero, so that the class and its caches are the stock ones.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import ClassVar, Literal

import torch

from secateur.catalog.architectures import Family
from secateur.engine.model.absent import Absent
from secateur.engine.model.decoder import Decoder, Layer
from secateur.engine.structures.base import Structure, Width
from secateur.engine.structures.caches import number_caches
from secateur.engine.structures.channels import Channels
from secateur.engine.structures.kv_groups import KVGroups

SubLayer = Literal["attention", "feed_forward"]
UNITS: dict[SubLayer, Width] = {"attention": KVGroups(), "feed_forward": Channels()}
"""The units that each sub-layer is made of."""


def modules(family: Family, sublayer: SubLayer) -> tuple[str, ...]:
    """Return the names of the modules of a block that make up the sub-layer: one, or in OPT two projections."""
    units = UNITS[sublayer]
    names = (*units.input_names(family), units.output_name(family))
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
def remove(layer: Layer, sublayer: SubLayer) -> None:
    """Let a module without parameters stand in for the sub-layer; :func:`number_caches` must follow.

    One unit of the sub-layer is kept outside the model, with zero output, for :func:`held`.
    """
    if is_absent(layer, sublayer):
        return
    units = UNITS[sublayer]
    count = units.units(layer)
    units.cut(layer, range(0, count, count // units.experts(layer)))
    output = units.output(layer)
    output.weight.zero_()
    if output.bias is not None:
        output.bias.zero_()
    _stand_in(layer, sublayer)


class Sublayer(Structure):
    """A structure that has one unit in a layer: a whole sub-layer."""

    sublayer: ClassVar[SubLayer]

    def units(self, layer: Layer) -> int:
        return int(not is_absent(layer, self.sublayer))

    def cut(self, layer: Layer, kept: Sequence[int]) -> None:
        if not kept:
            remove(layer, self.sublayer)

    def held(self, layer: Layer, kept: Sequence[int]) -> Mapping[str, tuple[int, ...]]:
        return {} if kept else {UNITS[self.sublayer].name: ()}


class Attention(Sublayer):
    name = sublayer = "attention"


class FeedForward(Sublayer):
    name = sublayer = "feed_forward"


@contextmanager
def held(decoder: Decoder) -> Iterator[None]:
    """Put a sub-layer of one unit with zero output in each place of a removed one, while the context lasts.

    The model computes the same, and its class is the stock one.
    """
    absent = hold(decoder)
    try:
        yield
    finally:
        for layer, sublayer in absent:
            _stand_in(layer, sublayer)
        number_caches(decoder)


def hold(decoder: Decoder) -> list[tuple[Layer, SubLayer]]:
    """Do as :func:`held` does, for good; return the places."""
    absent: list[tuple[Layer, SubLayer]] = [
        (layer, sublayer) for layer in decoder.layers for sublayer in UNITS if is_absent(layer, sublayer)
    ]
    for layer, sublayer in absent:
        _restore(layer, sublayer)
        layer.tell_sizes()
    number_caches(decoder)
    return absent


def _stand_in(layer: Layer, sublayer: SubLayer) -> None:
    for name in modules(layer.family, sublayer):
        layer.module.set_submodule(name, Absent(layer.module.get_submodule(name), sublayer == "attention"))


def _restore(layer: Layer, sublayer: SubLayer) -> None:
    for name in modules(layer.family, sublayer):
        absent = layer.module.get_submodule(name)
        assert isinstance(absent, Absent)
        layer.module.set_submodule(name, absent.stock)
