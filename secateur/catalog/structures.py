"""The structures: the kinds of units that pruning removes, with the number of units and their prices in each layer.

The engine's side of each structure is in ``secateur/engine/structures``.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from secateur.catalog.tables import by_name


@dataclass(frozen=True)
class LayerShape:
    """The sizes of one decoder layer; the layers of a model may differ in each of them.

    A layer without attention has no KV groups and no heads, and a layer without feed-forward has no channels.
    """

    kv_groups: int
    heads: int
    head_dim: int
    channels_per_expert: int
    """Number of channels of each expert; without a mixture of experts, of the layer."""
    experts: int = 1

    @property
    def channels(self) -> int:
        """Number of channels of all experts, which are stored one after the other."""
        return self.channels_per_expert * self.experts

    @property
    def heads_per_group(self) -> int:
        """Number of query heads in each KV group; 1 in a layer without attention."""
        return self.heads // self.kv_groups if self.kv_groups else 1

    def without(self, kv_groups: int) -> "LayerShape":
        """Return the shape of the layer without ``kv_groups`` of its KV groups."""
        return replace(self, kv_groups=self.kv_groups - kv_groups, heads=self.heads - kv_groups * self.heads_per_group)

    @property
    def attention_width(self) -> int:
        """Width of the outputs of all heads side by side."""
        return self.heads * self.head_dim


@dataclass(frozen=True)
class LayerCost:
    """The numbers of parameters from which the prices of a layer's units follow."""

    kv_group: int
    """Parameters of one KV group."""
    channel: int
    """Parameters of one channel of one expert."""
    attention_bias: int = 0
    channel_bias: int = 0
    """Parameters of the biases of the two output projections, which stay as long as the layer has units of the kind."""

    def parameters(self, layer: LayerShape) -> int:
        """Return the number of prunable parameters of a layer with the sizes ``layer``."""
        attention = layer.kv_groups * self.kv_group + self.attention_bias * (layer.kv_groups > 0)
        return attention + layer.channels * self.channel + self.channel_bias * (layer.channels > 0)


@dataclass(frozen=True)
class Structure:
    """A kind of unit; ``scope`` says whether every layer has units of its own or the model has them."""

    name: str
    summary: str
    scope: Literal["layer", "model"]
    units: Callable[[LayerShape], int]
    """Number of units in a layer; channels that all experts lose together are one unit."""
    price: Callable[[LayerShape, LayerCost], int]
    """Number of parameters that are removed with one unit of a layer."""
    removable: Callable[[LayerShape, int], int]
    """Number of units that a layer can lose, if widths are multiples of the given number."""
    left: Callable[[LayerShape, int], LayerShape]
    """The sizes of a layer of whose units in a plan, where each expert's channels count, so many stay."""
    alike: bool = False
    """Whether layers that were alike are alike after units left, so that the stock class holds them in every layout."""
    equal: bool = False
    """Whether every layer that has such units loses the same number of them, as its stock class has one number for all."""
    obstacle: Callable[[Mapping[str, Any]], str | None] = lambda config: None
    """The reason why no unit can leave a model with the given config, or ``None``."""


def _without_attention(layer: LayerShape) -> LayerShape:
    return replace(layer, kv_groups=0, heads=0)


def _without_feed_forward(layer: LayerShape) -> LayerShape:
    return replace(layer, channels_per_expert=0)


def _one_group(layer: LayerShape) -> LayerShape:
    """Return the layer with the one KV group that stands in the files for a removed attention."""
    return layer.without(max(layer.kv_groups - 1, 0))


def _one_channel(layer: LayerShape) -> LayerShape:
    """Return the layer with the one channel, of each expert, that stands in the files for a removed feed-forward."""
    return replace(layer, channels_per_expert=min(layer.channels_per_expert, 1))


def _without_both(layer: LayerShape) -> LayerShape:
    return _without_feed_forward(_without_attention(layer))


def _has_both(layer: LayerShape) -> bool:
    return bool(layer.kv_groups and layer.channels)


def _numbered_attention(config: Mapping[str, Any]) -> str | None:
    if config.get("scale_attn_by_inverse_layer_idx"):  # of GPT-2
        return "its attention is scaled by the number of the layer (scale_attn_by_inverse_layer_idx)"
    return None


def _of_depth(
    name: str,
    summary: str,
    without: Callable[[LayerShape], LayerShape],
    removable: Callable[[LayerShape], bool],
    published: Callable[[LayerShape], LayerShape] | None = None,
    **more: Any,
) -> Structure:
    """Return a structure of which a layer has one unit: what ``without`` takes from the layer's sizes.

    ``published`` returns the sizes that the layer has in the files then, which decide the price, if they are others.
    """
    published = published or without
    return Structure(
        name,
        summary,
        "layer",
        units=lambda layer: int(without(layer) != layer),
        price=lambda layer, cost: cost.parameters(layer) - cost.parameters(published(layer)),
        removable=lambda layer, multiple: int(removable(layer) and published(layer) != layer),
        left=lambda layer, kept: layer if kept else without(layer),
        **more,
    )


STRUCTURES: dict[str, Structure] = by_name(
    _of_depth(
        "layers",
        "a whole decoder layer",
        _without_both,
        lambda layer: _without_both(layer) != layer,
        alike=True,
        obstacle=_numbered_attention,
    ),
    _of_depth(
        "attention",
        "the attention of a decoder layer, whose feed-forward stays",
        _without_attention,
        _has_both,
        _one_group,
    ),
    _of_depth(
        "feed_forward",
        "the feed-forward block of a decoder layer, whose attention stays",
        _without_feed_forward,
        _has_both,
        _one_channel,
    ),
    Structure(
        "experts",
        "a whole expert of a mixture of experts, with its row of the router",
        "layer",
        units=lambda layer: layer.experts if layer.experts > 1 else 0,
        price=lambda layer, cost: layer.channels_per_expert * cost.channel,
        removable=lambda layer, multiple: max(layer.experts - 1, 0),
        left=lambda layer, kept: replace(layer, experts=kept),
        alike=True,
        equal=True,
    ),
    Structure(
        "kv_groups",
        "a key-value head with every query head that reads it",
        "layer",
        units=lambda layer: layer.kv_groups,
        price=lambda layer, cost: cost.kv_group,
        removable=lambda layer, multiple: max(layer.kv_groups - 1, 0),
        left=lambda layer, kept: layer.without(layer.kv_groups - kept),
    ),
    Structure(
        "channels",
        "a feed-forward channel, in a mixture one of every expert",
        "layer",
        units=lambda layer: layer.channels_per_expert,
        price=lambda layer, cost: layer.experts * cost.channel,
        removable=lambda layer, multiple: max(layer.channels_per_expert - multiple, 0),
        left=lambda layer, kept: replace(layer, channels_per_expert=kept // layer.experts),
    ),
)
"""All structures by name, in the order in which a plan is applied."""

Depth = Literal["layers", "attention", "feed_forward"]
DEPTH: tuple[Depth, ...] = ("layers", "attention", "feed_forward")
"""The structures of which a layer has one unit."""

EQUAL = tuple(name for name, structure in STRUCTURES.items() if structure.equal)
"""The structures of which every layer loses the same number of units."""

WHOLE = (*DEPTH, *EQUAL)
"""The structures that are removed before the widths are cut, because their units hold those of other structures."""

WIDTHS = ("kv_groups", "channels")
"""The structures that are cut in one pass, under one price: whole KV groups first, and channels make up the rest.

A request may name one of them alone."""
