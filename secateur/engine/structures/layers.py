"""Whole blocks as a structure: a removed block leaves the model, whose class is the stock one with fewer layers."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from torch import nn

from secateur.catalog.architectures import Family
from secateur.engine.model.decoder import Decoder, Layer
from secateur.engine.structures.base import Structure
from secateur.engine.structures.caches import number_caches
from secateur.engine.structures.sublayers import UNITS, held, hold, is_absent, remove

BY_LAYER = ("layer_types", "mlp_layer_types", "no_rope_layers")
"""The keys of a config that hold one entry for each layer."""
NUMBERS_OF_LAYERS = ("mlp_only_layers",)
"""The keys of a config that hold the numbers of some layers."""
EVERY_SO_MANY = {"decoder_sparse_step": "mlp_only_layers"}
"""The keys of a config that hold a number n, by which every n-th layer has experts, with the keys of the other layers."""
FIRST_LAYERS = ("max_window_layers",)
"""The keys of a config that hold a number n, by which the first n layers differ from the others."""


class Layers(Structure):
    """A layer has one unit, itself. While a model is pruned, a removed layer stays in its place without sub-layers."""

    name = "layers"

    def units(self, layer: Layer) -> int:
        return int(not is_removed(layer))

    def cut(self, layer: Layer, kept: Sequence[int]) -> None:
        if not kept:
            for sublayer in UNITS:
                remove(layer, sublayer)

    def held(self, layer: Layer, kept: Sequence[int]) -> Mapping[str, tuple[int, ...]]:
        return {} if kept else {units.name: () for units in UNITS.values()}


def is_removed(layer: Layer) -> bool:
    """Return whether the layer has lost both sub-layers, so that hidden states pass it unchanged."""
    return all(is_absent(layer, sublayer) for sublayer in UNITS)


@contextmanager
def as_published(decoder: Decoder) -> Iterator[None]:
    """Leave the removed layers out of the model, and hold removed sub-layers, as in its files, while the context lasts."""
    config, layers = decoder.model.config, decoder.layers
    keys = _changing_keys(decoder.shape.family)
    before = {key: getattr(config, key) for key in keys if getattr(config, key, None) is not None}
    cut(decoder, _present(decoder))
    try:
        with held(decoder):
            yield
    finally:
        if decoder.layers is not layers:
            decoder.layers = layers
            decoder.model.set_submodule(decoder.shape.family.layers, nn.ModuleList(each.module for each in layers))
            for key, value in before.items():
                setattr(config, key, value)
            number_caches(decoder)


def publish(decoder: Decoder) -> None:
    """Leave the removed layers out of the model and hold removed sub-layers for good, as in the model's files."""
    cut(decoder, _present(decoder))
    hold(decoder)


def _present(decoder: Decoder) -> list[int]:
    return [index for index, layer in enumerate(decoder.layers) if not is_removed(layer)]


def cut(decoder: Decoder, kept: Sequence[int]) -> None:
    """Keep only the blocks ``kept`` of the model in memory; the numbers are ascending and count the present blocks.

    The model's config, and the numbers by which attention modules find their caches, follow.
    """
    if len(kept) == len(decoder.layers):
        return
    config = decoder.model.config
    family = decoder.shape.family
    changed = config_with(config.to_dict(), family, kept)
    decoder.layers = [decoder.layers[index] for index in kept]
    decoder.model.set_submodule(family.layers, nn.ModuleList(layer.module for layer in decoder.layers))
    for key in _changing_keys(family):
        if getattr(config, key, None) is not None and key in changed:
            setattr(config, key, changed[key])
    number_caches(decoder)


def config_with(config: Mapping[str, Any], family: Family, kept: Sequence[int]) -> dict[str, Any]:
    """Return ``config`` for a model that keeps only the blocks ``kept``; the numbers are ascending.

    The config of the loaded model has every per-layer list that ``config.json`` leaves to a default, such as
    ``layer_types``: the lists must be written, because their defaults follow from the numbers of the layers.
    """
    changed, place = dict(config), {index: new for new, index in enumerate(kept)}
    depth = family.name_of("num_hidden_layers")
    changed[depth] = len(kept)
    for key in BY_LAYER:
        if entries := config.get(key):
            changed[key] = [entries[index] for index in kept]
    for key, others in EVERY_SO_MANY.items():
        if (step := config.get(key) or 1) > 1:
            without = {index for index in range(config[depth]) if (index + 1) % step}
            config = {**config, others: sorted(without.union(config.get(others) or ()))}
            changed[key] = 1
    for key in NUMBERS_OF_LAYERS:
        if numbers := config.get(key):
            changed[key] = [place[index] for index in numbers if index in place]
    for key in FIRST_LAYERS:
        if config.get(key) is not None:
            changed[key] = sum(index < config[key] for index in kept)
    return changed


def written_config(config: Mapping[str, Any], loaded: Mapping[str, Any], family: Family) -> dict[str, Any]:
    """Return the ``config.json`` of a model whose blocks were cut.

    ``config`` is the source's ``config.json``; ``loaded`` is the config of the cut model in memory.
    """
    depth = family.name_of("num_hidden_layers")
    if config.get(depth) == loaded[depth]:
        return dict(config)
    return {**config, **{key: loaded[key] for key in _changing_keys(family) if loaded.get(key) is not None}}


def _changing_keys(family: Family) -> tuple[str, ...]:
    """Return the keys of a config whose values change when blocks leave."""
    return (family.name_of("num_hidden_layers"), *BY_LAYER, *NUMBERS_OF_LAYERS, *EVERY_SO_MANY, *FIRST_LAYERS)
