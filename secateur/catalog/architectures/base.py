"""What pruning needs to know of an architecture: where heads and channels live, and the arithmetic of their parameters.

Units are whole KV groups (a KV head with every query head that reads it) and feed-forward channels (a row of each input
projection with its column of the output projection). Names are module names within a decoder layer, as transformers has
them.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import accumulate
from typing import Any, Literal

from secateur.contract.errors import ErrorCode, PruningError

WIDE_INTERMEDIATE = 4096
"""From this feed-forward width on, 256 channels are a fine enough step (K-quants want multiples of 256)."""
NEAR = 0.01
"""Of the prunable parameters: a ratio missed by no more is as good as any that is nearer."""
MOST_LAYERS = 1024
LARGEST_SIZE = 2**24
"""Beyond any model there is: a config is a stranger's text, and sizes turn into memory."""


def read_size(config: Mapping[str, Any], key: str, default: int | None = None, most: int = LARGEST_SIZE) -> int:
    """The size that a config gives under ``key``.

    Raises:
        PruningError: ``config_invalid`` where it is no size.
    """
    value = config.get(key)
    value = default if value is None else value
    if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= most:
        raise PruningError(
            ErrorCode.CONFIG_INVALID,
            f"config.json: '{key}' must be an integer from 1 to {most}, not {repr(value)[:40]}.",
            field="model_id",
        )
    return value


StockHeads = Literal["any", "divisors", "unchanged"]
"""Any, those that divide ``hidden_size``, the model's own."""


@dataclass(frozen=True)
class Family:
    """One architecture family. Adding one is a file with one of these and a line in ``FAMILIES``.

    ``query``, ``key`` and ``value`` have a block of ``head_dim`` rows a head; ``attention_output`` the matching columns.
    Each of ``channel_inputs`` has a row a channel, ``channel_output`` a column. ``biased`` tells, from the config, which
    of these projections carry a bias.

    Where a stock layer computes several of these in one module, or keeps a weight the other way round than ``nn.Linear``,
    ``fused`` names the module and, in the order of its rows, the parts that it is taken apart into; a part's name is the
    module's, a dot, and its own. The rows of ``interleaved`` modules go head by head: one head's of each part, then the next.
    """

    name: str
    model_types: tuple[str, ...]
    layers: str
    query: str
    key: str
    value: str
    attention_output: str
    channel_inputs: tuple[str, ...]
    channel_output: str
    norm_parameters: Callable[[Mapping[str, Any]], int]
    """Parameters of one layer's norms."""
    experts: tuple[str, ...] = ()
    """What configs call the number of experts, where a layer has a mixture of them: feed-forward networks, of which a router
    sends each token to ``num_experts_per_tok``. Their stock module, which owns the channels' projections, is taken apart into
    these. Of two names the first counts that a config has."""
    biased: Callable[[Mapping[str, Any]], frozenset[str]] = lambda config: frozenset()
    outer_parameters: Callable[[Mapping[str, Any]], int] = lambda config: int(config["hidden_size"])
    """Parameters of the final norm, and of embeddings beside the tokens'."""
    refused: Callable[[Mapping[str, Any]], str | None] = lambda config: None
    """Why a model of this config cannot be pruned, where some of the family can and some cannot."""
    fused: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    interleaved: frozenset[str] = frozenset()
    sizes: Mapping[str, str] = field(default_factory=dict)
    """Attributes in which a layer's modules keep widths that their forward reads, each with its name in :class:`LayerShape`."""
    additive: bool = True
    """Whether what attention and feed-forward give is added to the hidden states, and neither is normed before."""
    two_positions: bool = False
    """Whether each token has two positions, which no stock class knows."""
    opened: bool = False
    """Whether these models write poorly after text without the special tokens that their tokenizer puts before it."""
    defaults: Mapping[str, Any] = field(default_factory=dict)
    """What the config's class assumes where ``config.json`` is silent, if that is not what others assume."""
    stock_heads: Callable[[Mapping[str, Any]], StockHeads] = lambda config: "any"
    """Head counts that a stock class takes with the same ``head_dim``."""
    twins: Mapping[str, tuple[str, str]] = field(default_factory=dict)
    """By ``model_type`` whose own class takes divisors alone, where another computes the same and takes any number of heads:
    type and class that a checkpoint without code is written as, where its own does not do."""
    default_width: int | None = None
    """Feed-forward channels for each hidden unit, where ``config.json`` gives no width."""
    names: Mapping[str, str] = field(default_factory=dict)
    """What this family's config calls ``num_attention_heads`` and its like, if not so. Where every head has a key and value
    of its own, ``num_key_value_heads`` is the number of heads by another name."""

    def name_of(self, size: str) -> str:
        """The config's name for ``size``."""
        return self.names.get(size, size)

    def module(self, projection: str) -> str:
        """The stock layer's module that computes ``projection``."""
        owner = projection.rpartition(".")[0]
        return owner if owner in self.fused else projection

    @property
    def attention_inputs(self) -> tuple[str, str, str]:
        return (self.query, self.key, self.value)

    @property
    def projections(self) -> tuple[str, ...]:
        """Every projection that pruning cuts: the prunable parameters are those of these modules."""
        return (*self.attention_inputs, self.attention_output, *self.channel_inputs, self.channel_output)


@dataclass(frozen=True)
class LayerShape:
    """One decoder layer's widths."""

    kv_groups: int
    heads: int
    head_dim: int
    channels_per_expert: int
    """Channels of each expert, where there is a mixture of them."""
    experts: int = 1

    @property
    def channels(self) -> int:
        """Of all experts, one after the other."""
        return self.channels_per_expert * self.experts

    @property
    def heads_per_group(self) -> int:
        return self.heads // self.kv_groups

    def without(self, kv_groups: int) -> "LayerShape":
        """The layer with so many KV groups less."""
        return replace(self, kv_groups=self.kv_groups - kv_groups, heads=self.heads - kv_groups * self.heads_per_group)

    @property
    def attention_width(self) -> int:
        """Outputs of all heads side by side."""
        return self.heads * self.head_dim


@dataclass(frozen=True)
class UnitCost:
    """Parameters that go with one unit, the same in every layer, and those that stay in a layer whatever is cut.

    Experts are all equally wide, so with a channel goes one of every expert.
    """

    kv_group: int
    channel: int
    fixed: int


def channel_steps(width: int, multiple: int) -> list[int]:
    """Channels that go with each step down from ``width``, through the multiples, to the one block that stays."""
    if width <= multiple:
        return []
    odd = width % multiple
    return ([odd] if odd else []) + [multiple] * (width // multiple - 1)


def nearest_groups(wished: float, choices: Sequence[int], channels: int, total: float, cost: UnitCost) -> int:
    """How many KV groups go: of ``choices`` the nearest to ``wished`` with which ``channels`` can make up ``total`` parameters."""

    def miss(count: int) -> float:
        left = total - count * cost.kv_group
        return max(-left, left - channels * cost.channel, 0.0)

    return min(choices, key=lambda count: (miss(count), abs(count - wished)))


@dataclass(frozen=True)
class ModelShape:
    """Sizes of a model, from its config alone."""

    family: Family
    model_type: str
    hidden_size: int
    vocab_size: int
    tied_embeddings: bool
    max_positions: int
    layers: tuple[LayerShape, ...]
    cost: UnitCost
    other_parameters: int
    """Embeddings, norms, routers and head: what pruning leaves alone."""
    experts_per_token: int = 1
    """Experts that a token is sent to."""
    stock_heads: StockHeads = "any"
    """See :class:`Family`."""

    @cached_property
    def prunable_parameters(self) -> int:
        """Parameters in the decoder blocks' attention and feed-forward projections: what ``target_ratio`` is a share of."""
        return sum(self.layer_parameters(layer) for layer in self.layers)

    @property
    def parameters(self) -> int:
        return self.prunable_parameters + self.other_parameters

    def layer_parameters(self, layer: LayerShape) -> int:
        cost = self.cost
        return layer.kv_groups * cost.kv_group + layer.channels_per_expert * cost.channel + cost.fixed

    def width_multiple(self, asked: int | None) -> int:
        """Feed-forward widths are multiples of this: ``asked``, or 256 for wide models, else 32 (design of the export)."""
        return asked or (256 if self.layers[0].channels_per_expert >= WIDE_INTERMEDIATE else 32)

    def removable(self, layer: LayerShape, multiple: int) -> tuple[int, int]:
        """The most that a layer can give, in KV groups and in channels: one group and one block of channels stay."""
        return layer.kv_groups - 1, sum(channel_steps(layer.channels_per_expert, multiple))

    def takes_heads(self, layer: LayerShape) -> bool:
        """Whether the stock class can have every layer with the heads of ``layer``."""
        match self.stock_heads:
            case "any":
                return True
            case "divisors":
                return self.hidden_size % layer.heads == 0
            case "unchanged":
                return layer.heads == self.layers[0].heads

    def max_ratio(self, width_multiple: int | None = None, uniform: bool = False) -> float:
        """The largest ratio: all that every layer can give."""
        choices, channels = self._removable(self.width_multiple(width_multiple), uniform)
        return (choices[-1] * self.cost.kv_group + channels * self.cost.channel) / self.prunable_parameters

    def split(self, ratio: float, width_multiple: int | None, uniform: bool = False) -> tuple[int, float]:
        """What a ratio takes from the source, in KV groups and in parameters of channels.

        Heads give the same share of themselves as the whole does, as near as whole groups come to it and as channels can
        make up the difference. Where layers are to stay ``uniform``, the same number in every layer: of what comes near to
        the ratio in whole groups and whole steps of channels, that with the share of heads that is nearest to the whole's.
        """
        wanted, multiple = ratio * self.prunable_parameters, self.width_multiple(width_multiple)
        choices, channels = self._removable(multiple, uniform)
        share = ratio * sum(layer.kv_groups for layer in self.layers)
        if uniform:
            price = self.cost.channel * len(self.layers)
            steps = accumulate(channel_steps(self.layers[0].channels_per_expert, multiple), initial=0)
            pairs = [(count, float(step * price)) for step in steps for count in choices]
            misses = [abs(count * self.cost.kv_group + channels - wanted) for count, channels in pairs]
            near = max(min(misses), min(NEAR * self.prunable_parameters, self.block(width_multiple, uniform) / 2))
            found = [
                (abs(pair[0] - share), miss, pair) for pair, miss in zip(pairs, misses, strict=True) if miss <= near
            ]
            return min(found)[2]
        count = nearest_groups(share, choices, channels, wanted, self.cost)
        return count, min(max(wanted - count * self.cost.kv_group, 0.0), channels * self.cost.channel)

    def nearest_ratio(self, target_ratio: float, width_multiple: int | None = None, uniform: bool = False) -> float:
        """The ratio nearest to the target that whole KV groups and whole blocks of channels make."""
        groups, channels = self.split(target_ratio, width_multiple, uniform)
        limit = self._removable(self.width_multiple(width_multiple), uniform)[1] * self.cost.channel
        block = self.block(width_multiple)
        below = min(math.ceil(channels / block - 0.5) * block, limit)  # of two that are as near, the smaller is cut
        whole = channels if uniform else min((below, limit), key=lambda size: abs(size - channels))
        return (groups * self.cost.kv_group + whole) / self.prunable_parameters

    def block(self, width_multiple: int | None = None, uniform: bool = False) -> int:
        """Parameters of one step of channels, which every layer takes at once where they are to stay ``uniform``."""
        return self.width_multiple(width_multiple) * self.cost.channel * (len(self.layers) if uniform else 1)

    def check_ratio(
        self,
        target_ratio: float,
        width_multiple: int | None = None,
        uniform: bool = False,
        *,
        field: str = "target_ratio",
    ) -> None:
        """Refuse a target that misses by more than half a block of channels, or that would remove nothing.

        ``field`` is the request's that asked for it.

        Raises:
            PruningError: ``ratio_unreachable``, naming the nearest ratio that can be met.
        """
        nearest = self.nearest_ratio(target_ratio, width_multiple, uniform)
        block = self.block(width_multiple, uniform) / self.prunable_parameters
        if nearest > 0 and abs(nearest - target_ratio) <= block / 2 + 1e-12:
            return
        smallest = block
        if uniform:
            fewest = [count for count in self._removable(self.width_multiple(width_multiple), True)[0] if count][:1]
            smallest = min(block, *(count * self.cost.kv_group / self.prunable_parameters for count in fewest), 1.0)
        raise PruningError(
            ErrorCode.RATIO_UNREACHABLE,
            f"This model cannot be pruned by {target_ratio:g}: the nearest ratio that can be met is "
            f"{nearest or smallest:.6f} (at most {self.max_ratio(width_multiple, uniform):.6f}: one KV group and one "
            f"block of {self.width_multiple(width_multiple)} channels stay in every layer"
            f"{', and all layers are alike' if uniform else ''}).",
            field=field,
        )

    def _removable(self, multiple: int, uniform: bool = False) -> tuple[Sequence[int], int]:
        """The numbers of KV groups that can go, ascending, and the most channels."""
        by_layer = [self.removable(layer, multiple) for layer in self.layers]
        channels = sum(channels for _, channels in by_layer)
        if not uniform:
            return range(sum(groups for groups, _ in by_layer) + 1), channels
        first, depth = self.layers[0], len(self.layers)
        fewer = (first.without(groups) for groups in range(by_layer[0][0] + 1))
        return [(first.kv_groups - layer.kv_groups) * depth for layer in fewer if self.takes_heads(layer)], channels

    def as_dict(self) -> dict[str, Any]:
        """For ``POST /v1/models/inspect``."""
        return {
            "family": self.family.name,
            "model_type": self.model_type,
            "hidden_size": self.hidden_size,
            "vocab_size": self.vocab_size,
            "tied_embeddings": self.tied_embeddings,
            "parameters": self.parameters,
            "prunable_parameters": self.prunable_parameters,
            "parameters_per_kv_group": self.cost.kv_group,
            "parameters_per_channel": self.cost.channel,
            "width_multiple": self.width_multiple(None),
            "max_ratio": self.max_ratio(),
            "experts_per_token": self.experts_per_token,
            "layers": [
                {
                    "layer": index,
                    "kv_groups": layer.kv_groups,
                    "heads": layer.heads,
                    "head_dim": layer.head_dim,
                    "channels": layer.channels_per_expert,
                    "experts": layer.experts,
                }
                for index, layer in enumerate(self.layers)
            ],
        }
