"""What pruning must know of an architecture: the modules that hold heads and channels, and their parameter counts.

The units are whole KV groups (a KV head with every query head that reads it) and feed-forward channels (a row of each
input projection with its column of the output projection). Names are module names within a decoder layer, as
transformers uses them.
"""

import math
from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import accumulate
from typing import Any, Literal

from secateur.catalog.untrusted import LARGEST_NUMBER, shown
from secateur.contract.errors import ErrorCode, PruningError

WIDE_INTERMEDIATE = 4096
"""The feed-forward width from which a step of 256 channels is fine enough (K-quants need multiples of 256)."""
NEAR = 0.01
"""A share of the prunable parameters: a ratio that is missed by at most this share counts as near enough."""
MOST_HEADS, MOST_EXPERTS, MOST_CHANNELS = 1024, 4096, 2**20
"""Bounds beyond all models; a config is untrusted input, and these sizes determine the time that planning takes."""


def read_size(config: Mapping[str, Any], key: str, default: int | None = None, most: int = LARGEST_NUMBER) -> int:
    """Return the size that a config gives under ``key``.

    Raises:
        PruningError: ``config_invalid`` if the value is not an integer from 1 to ``most``.
    """
    value = config.get(key)
    value = default if value is None else value
    if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= most:
        raise PruningError(
            ErrorCode.CONFIG_INVALID,
            f"config.json: '{key}' must be an integer from 1 to {most}, not {shown(value)}.",
            field="model_id",
        )
    return value


StockHeads = Literal["any", "divisors", "unchanged"]
"""The numbers of heads that a stock class accepts: any, those that divide ``hidden_size``, or only the model's own."""


@dataclass(frozen=True)
class Family:
    """A family of architectures. A new family needs one file with one such object, and a line in ``FAMILIES``.

    ``query``, ``key`` and ``value`` have a block of ``head_dim`` rows for each head, and ``attention_output`` has the
    matching columns. Each of ``channel_inputs`` has one row for each channel, and ``channel_output`` has one column.
    ``biased`` returns, from the config, the names of the projections that have a bias.

    ``fused`` is for stock layers that compute several of these projections in one module, or that store a weight
    transposed to ``nn.Linear``. It maps the module to the names of the projections that the module is split into, in
    the order of the module's rows; a projection's full name is the module's name, a dot, and the projection's own name.
    In ``interleaved`` modules the rows are ordered by head: the rows of each projection for one head, then the rows for
    the next head.
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
    """Number of parameters in the norms of one layer."""
    experts: tuple[str, ...] = ()
    """The config's keys for the number of experts, for layers with a mixture of experts.

    Experts are feed-forward networks; a router sends each token to ``num_experts_per_tok`` of them. The stock module
    that owns the channels' projections is split into the experts. If a config has several of the keys, the first key in
    this tuple counts.
    """
    biased: Callable[[Mapping[str, Any]], frozenset[str]] = lambda config: frozenset()
    outer_parameters: Callable[[Mapping[str, Any]], int] = lambda config: int(config["hidden_size"])
    """Number of parameters in the final norm, and in embeddings other than the token embeddings."""
    refused: Callable[[Mapping[str, Any]], str | None] = lambda config: None
    """The reason why a model of this config cannot be pruned, or ``None``; only some families have such models."""
    fused: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    interleaved: frozenset[str] = frozenset()
    sizes: Mapping[str, str] = field(default_factory=dict)
    """Attributes from which a layer's modules read widths in their forward, with the names in :class:`LayerShape`."""
    additive: bool = True
    """Whether attention and feed-forward outputs are added to the hidden states without a norm before."""
    two_positions: bool = False
    """Whether each token has two positions, which no stock class supports."""
    opened: bool = False
    """Whether these models write poorly after text that lacks the special tokens their tokenizer puts before it."""
    defaults: Mapping[str, Any] = field(default_factory=dict)
    """The config class's values for keys that ``config.json`` lacks, if they differ from those of other families."""
    stock_heads: Callable[[Mapping[str, Any]], StockHeads] = lambda config: "any"
    """The numbers of heads that the stock class accepts with the same ``head_dim``."""
    twins: Mapping[str, tuple[str, str]] = field(default_factory=dict)
    """The type and class that a checkpoint without code is written as, by ``model_type``.

    An entry is for a model type whose own class accepts only numbers of heads that divide ``hidden_size``, where
    another class computes the same function and accepts any number of heads. The entry is used if the model's own class
    does not accept the heads.
    """
    default_width: int | None = None
    """Number of feed-forward channels for each hidden unit, where ``config.json`` gives no width."""
    names: Mapping[str, str] = field(default_factory=dict)
    """The family's config keys for ``num_attention_heads`` and similar sizes, where the keys differ from these names.

    If every head has its own key and value, ``num_key_value_heads`` maps to the key for the number of heads.
    """

    def name_of(self, size: str) -> str:
        """Return the config's key for ``size``."""
        return self.names.get(size, size)

    def module(self, projection: str) -> str:
        """Return the name of the stock layer's module that computes ``projection``."""
        owner = projection.rpartition(".")[0]
        return owner if owner in self.fused else projection

    @property
    def attention_inputs(self) -> tuple[str, str, str]:
        return (self.query, self.key, self.value)

    @property
    def projections(self) -> tuple[str, ...]:
        """Every projection that pruning cuts; the prunable parameters are the parameters of these modules."""
        return (*self.attention_inputs, self.attention_output, *self.channel_inputs, self.channel_output)


@dataclass(frozen=True)
class LayerShape:
    """The widths of one decoder layer."""

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
        return self.heads // self.kv_groups

    def without(self, kv_groups: int) -> "LayerShape":
        """Return the shape of the layer without ``kv_groups`` of its KV groups."""
        return replace(self, kv_groups=self.kv_groups - kv_groups, heads=self.heads - kv_groups * self.heads_per_group)

    @property
    def attention_width(self) -> int:
        """Width of the outputs of all heads side by side."""
        return self.heads * self.head_dim


@dataclass(frozen=True)
class UnitCost:
    """The numbers of parameters that are removed with one unit, and the number that stays in a layer whatever is cut.

    The numbers are the same in every layer. All experts have the same width, so removing a channel removes one channel
    of every expert.
    """

    kv_group: int
    channel: int
    fixed: int


def channel_steps(width: int, multiple: int) -> list[int]:
    """Return the channels that each step removes, from ``width`` through the multiples to the one block that stays."""
    if width <= multiple:
        return []
    odd = width % multiple
    return ([odd] if odd else []) + [multiple] * (width // multiple - 1)


def nearest_groups(wished: float, choices: Sequence[int], channels: int, total: float, cost: UnitCost) -> int:
    """Return the number of KV groups to remove.

    Of the choices that come nearest to ``total``, the function returns the nearest to ``wished``. ``total`` is the
    number of parameters to remove; at most ``channels`` channels make up the part that KV groups do not.
    """

    def miss(count: int) -> float:
        left = total - count * cost.kv_group
        return max(-left, left - channels * cost.channel, 0.0)

    return min(choices, key=lambda count: (miss(count), abs(count - wished)))


@dataclass(frozen=True)
class ModelShape:
    """The sizes of a model, from its config alone."""

    family: Family
    model_type: str
    hidden_size: int
    vocab_size: int
    tied_embeddings: bool
    max_positions: int
    layers: tuple[LayerShape, ...]
    cost: UnitCost
    other_parameters: int
    """Number of parameters that pruning does not change: embeddings, norms, routers and the language-model head."""
    experts_per_token: int = 1
    """Number of experts that the router sends each token to."""
    stock_heads: StockHeads = "any"
    """The numbers of heads that the stock class accepts with the same ``head_dim``."""

    @cached_property
    def prunable_parameters(self) -> int:
        """Number of parameters in attention and feed-forward projections; ``target_ratio`` is a share of it."""
        return sum(self.layer_parameters(layer) for layer in self.layers)

    @property
    def parameters(self) -> int:
        return self.prunable_parameters + self.other_parameters

    def layer_parameters(self, layer: LayerShape) -> int:
        cost = self.cost
        return layer.kv_groups * cost.kv_group + layer.channels_per_expert * cost.channel + cost.fixed

    def width_multiple(self, asked: int | None) -> int:
        """Return the number that all feed-forward widths are multiples of.

        The number is ``asked`` if the request sets it, else 256 for wide models and 32 for all others.
        """
        return asked or (256 if self.layers[0].channels_per_expert >= WIDE_INTERMEDIATE else 32)

    def removable(self, layer: LayerShape, multiple: int) -> tuple[int, int]:
        """Return how many KV groups and channels a layer can lose: one group and one block of channels stay."""
        return layer.kv_groups - 1, max(layer.channels_per_expert - multiple, 0)

    def takes_heads(self, layer: LayerShape) -> bool:
        """Return whether the stock class allows every layer to have the number of heads of ``layer``."""
        match self.stock_heads:
            case "any":
                return True
            case "divisors":
                return self.hidden_size % layer.heads == 0
            case "unchanged":
                return layer.heads == self.layers[0].heads

    def max_ratio(self, width_multiple: int | None = None, uniform: bool = False) -> float:
        """Return the largest ratio, at which every layer loses all that it can lose."""
        choices, channels = self._removable(self.width_multiple(width_multiple), uniform)
        return (choices[-1] * self.cost.kv_group + channels * self.cost.channel) / self.prunable_parameters

    def split(self, ratio: float, width_multiple: int | None, uniform: bool = False) -> tuple[int, float]:
        """Return the number of KV groups and the number of channel parameters that a ratio removes from the source.

        KV groups lose the same share as the whole model, as near as whole groups come to the share and as channels can
        make up the difference. With ``uniform``, every layer loses the same number of units: of the combinations of
        whole groups and whole steps of channels that come near to the ratio, the function chooses the one whose share
        of KV groups is nearest to the share of the whole model.
        """
        wanted, multiple = ratio * self.prunable_parameters, self.width_multiple(width_multiple)
        choices, channels = self._removable(multiple, uniform)
        share = ratio * sum(layer.kv_groups for layer in self.layers)
        if uniform:
            price = self.cost.channel * len(self.layers)
            steps = list(accumulate(channel_steps(self.layers[0].channels_per_expert, multiple), initial=0))
            found = []
            for count in choices:
                above = bisect_left(steps, (wanted - count * self.cost.kv_group) / price)
                for step in steps[max(above - 1, 0) : above + 1]:  # any other misses by more
                    miss = abs(count * self.cost.kv_group + step * price - wanted)
                    found.append((abs(count - share), miss, (count, float(step * price))))
            least = min(miss for _, miss, _ in found)
            near = max(least, min(NEAR * self.prunable_parameters, self.block(width_multiple, uniform) / 2))
            return min(each for each in found if each[1] <= near)[2]
        count = nearest_groups(share, choices, channels, wanted, self.cost)
        return count, min(max(wanted - count * self.cost.kv_group, 0.0), channels * self.cost.channel)

    def nearest_ratio(self, target_ratio: float, width_multiple: int | None = None, uniform: bool = False) -> float:
        """Return the ratio nearest to ``target_ratio`` that whole KV groups and whole blocks of channels reach."""
        groups, channels = self.split(target_ratio, width_multiple, uniform)
        limit = self._removable(self.width_multiple(width_multiple), uniform)[1] * self.cost.channel
        block = self.block(width_multiple)
        below = min(math.ceil(channels / block - 0.5) * block, limit)  # of two sizes equally near, the smaller is cut
        whole = channels if uniform else min((below, limit), key=lambda size: abs(size - channels))
        return (groups * self.cost.kv_group + whole) / self.prunable_parameters

    def block(self, width_multiple: int | None = None, uniform: bool = False) -> int:
        """Return the number of parameters in one step of channels; with ``uniform``, all layers take a step at once."""
        return self.width_multiple(width_multiple) * self.cost.channel * (len(self.layers) if uniform else 1)

    def check_ratio(
        self,
        target_ratio: float,
        width_multiple: int | None = None,
        uniform: bool = False,
        *,
        field: str = "target_ratio",
    ) -> None:
        """Refuse a ratio that is missed by more than half a block of channels, or that would remove nothing.

        ``field`` is the request's field that the error names.

        Raises:
            PruningError: ``ratio_unreachable``; the message names the nearest ratio that can be reached.
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
        """Return the numbers of KV groups that can be removed, ascending, and the largest number of channels."""
        by_layer = [self.removable(layer, multiple) for layer in self.layers]
        channels = sum(channels for _, channels in by_layer)
        if not uniform:
            return range(sum(groups for groups, _ in by_layer) + 1), channels
        first, depth = self.layers[0], len(self.layers)
        fewer = (first.without(groups) for groups in range(by_layer[0][0] + 1))
        return [(first.kv_groups - layer.kv_groups) * depth for layer in fewer if self.takes_heads(layer)], channels

    def as_dict(self) -> dict[str, Any]:
        """Return the sizes as JSON-able data for ``POST /v1/models/inspect``."""
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
