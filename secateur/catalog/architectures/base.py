"""What pruning must know of an architecture: the modules that hold heads and channels, and their parameter counts.

The units are whole KV groups (a KV head with every query head that reads it) and feed-forward channels (a row of each
input projection with its column of the output projection). Names are module names within a decoder layer, as
transformers uses them.
"""

import math
from bisect import bisect_left, bisect_right
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import accumulate
from typing import Any, Literal

from secateur.catalog.structures import DEPTH, STRUCTURES, WIDTHS, LayerCost, LayerShape
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
    dense: "Family | None" = None
    """The family that layers without experts follow, if a model may have layers of both kinds."""
    is_dense: Callable[[Mapping[str, Any], int], bool] = lambda config, index: False
    """Whether the layer of this number has no experts; only a family with ``dense`` has such layers."""
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
    def structures(self) -> tuple[str, ...]:
        """The structures whose units this family's layers have, in the order of :data:`STRUCTURES`."""
        # In the first ChatGLM-6B, hidden states change in a layer even if both of its sub-layers add nothing.
        lacking = {*(DEPTH if self.two_positions else ()), *(() if self.experts else ("experts",))}
        return tuple(name for name in STRUCTURES if name not in lacking)

    @property
    def attention_inputs(self) -> tuple[str, str, str]:
        return (self.query, self.key, self.value)

    @property
    def projections(self) -> tuple[str, ...]:
        """Every projection that pruning cuts; the prunable parameters are the parameters of these modules."""
        return (*self.attention_inputs, self.attention_output, *self.channel_inputs, self.channel_output)


def channel_steps(width: int, multiple: int) -> list[int]:
    """Return the channels that each step removes, from ``width`` through the multiples to the one block that stays."""
    if width <= multiple:
        return []
    odd = width % multiple
    return ([odd] if odd else []) + [multiple] * (width // multiple - 1)


def nearest_amount(wished: float, choices: Sequence[int], rest: float, total: float) -> int:
    """Return the number of parameters to remove with whole KV groups.

    Of the ascending choices that come nearest to ``total``, the function returns the nearest to ``wished``. ``total`` is the
    number of parameters to remove; channels make up at most ``rest`` parameters of what KV groups do not.
    """

    begin, end = bisect_left(choices, total - rest), bisect_right(choices, total)
    if begin < end:  # channels can make up the difference
        at = bisect_left(choices, wished, begin, end)
        return min(choices[max(at - 1, begin) : min(at + 1, end)], key=lambda each: abs(each - wished))
    around = choices[max(begin - 1, 0) : begin + 1]
    return min(around, key=lambda each: (max(each - total, total - each - rest), abs(each - wished)))


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
    costs: tuple[LayerCost, ...]
    """What the units of each layer cost."""
    other_parameters: int
    """Number of parameters that pruning does not change: embeddings, norms, routers and the language-model head."""
    stock_layer: LayerShape
    """The sizes that the config gives every layer which has none of its own; in a family of mixtures, if it has experts."""
    experts_per_token: int = 1
    """Number of experts that the router sends each token to."""
    stock_heads: StockHeads = "any"
    """The numbers of heads that the stock class accepts with the same ``head_dim``."""
    widths: tuple[str, ...] = WIDTHS
    """The width structures that may be cut: both of them, or one alone."""
    dense: frozenset[int] = frozenset()
    """The numbers of the layers without experts, in a family of mixtures."""
    dense_layer: LayerShape | None = None
    """The sizes that the config gives each of these layers."""

    def cutting(self, structures: Sequence[str]) -> "ModelShape":
        """Return the sizes of the model of which only those widths that ``structures`` names may be cut."""
        return replace(self, widths=tuple(name for name in WIDTHS if name in structures))

    @cached_property
    def prunable_parameters(self) -> int:
        """Number of parameters in attention and feed-forward projections; ``target_ratio`` is a share of it."""
        return sum(self.layer_parameters(index) for index in range(len(self.layers)))

    def standing_in(self, source: "ModelShape") -> int:
        """Return the parameters of the units that stand in the files for sub-layers which were removed from ``source``.

        A removed attention or feed-forward has one unit in the files, whose output is zero; a removed layer has none.
        """
        total = 0
        for own, before, cost in zip(self.layers, source.layers, source.costs, strict=True):
            for name, gone in (("attention", not own.kv_groups), ("feed_forward", not own.channels)):
                if gone and (own.kv_groups or own.channels):
                    without = cost.parameters(STRUCTURES[name].left(before, 0))
                    total += cost.parameters(before) - without - STRUCTURES[name].price(before, cost)
        return total

    @property
    def parameters(self) -> int:
        return self.prunable_parameters + self.other_parameters

    @property
    def vocabulary_parameters(self) -> int:
        """Number of parameters of the embedding and the head, from which removed tokens take their rows."""
        return self.vocab_size * self.hidden_size * (1 if self.tied_embeddings else 2)

    def layer_parameters(self, index: int, now: LayerShape | None = None) -> int:
        """Return the prunable parameters of layer ``index``, with the sizes ``now`` or else those of the source."""
        return self.costs[index].parameters(now or self.layers[index])

    def price(self, structure: str, index: int, now: LayerShape | None = None) -> int:
        """Return the parameters of one unit of layer ``index``, with the sizes ``now`` or else those of the source."""
        return STRUCTURES[structure].price(now or self.layers[index], self.costs[index])

    def units(self, structure: str, index: int, now: LayerShape | None = None) -> int:
        """Return the number of units of layer ``index``, with the sizes ``now`` or else those of the source."""
        return STRUCTURES[structure].units(now or self.layers[index])

    def removable(self, structure: str, index: int, multiple: int, now: LayerShape | None = None) -> int:
        """Return how many units layer ``index`` can lose: one group and one block of channels stay in it."""
        if structure in WIDTHS and structure not in self.widths:
            return 0
        return STRUCTURES[structure].removable(now or self.layers[index], multiple)

    @property
    def differs(self) -> bool:
        """Whether the source's layers differ in their sizes."""
        stocks = (self.stock_of(self.family_of(index)) for index in range(len(self.layers)))
        return any(layer != stock for layer, stock in zip(self.layers, stocks, strict=True))

    @property
    def differs_in_kind(self) -> bool:
        """Whether layers differ in more than their numbers of KV groups and channels, as layers with and without experts."""
        kinds = {(layer.heads_per_group, layer.head_dim, layer.experts) for layer in self.layers}
        return len(kinds) > 1 or bool(self.dense)

    def stock_of(self, family: Family) -> LayerShape:
        """Return the sizes that the config gives every layer of ``family`` which has none of its own."""
        return self.stock_layer if family is self.family or self.dense_layer is None else self.dense_layer

    def family_of(self, index: int) -> Family:
        """Return the family that layer ``index`` follows."""
        return self.family.dense if self.family.dense is not None and index in self.dense else self.family

    def width_multiple(self, asked: int | None) -> int:
        """Return the number that all feed-forward widths are multiples of.

        The number is ``asked`` if the request sets it, else 256 for wide models and 32 for all others.
        """
        return asked or (256 if self.stock_layer.channels_per_expert >= WIDE_INTERMEDIATE else 32)

    def takes_heads(self, layer: LayerShape) -> bool:
        """Return whether the stock class allows every layer to have the number of heads of ``layer``."""
        match self.stock_heads:
            case "any":
                return True
            case "divisors":
                return self.hidden_size % layer.heads == 0
            case "unchanged":
                return layer.heads == self.stock_layer.heads

    @property
    def fits_uniform(self) -> bool:
        """Whether the stock class allows a number of KV groups that all layers can be left with."""
        return bool(self.common_units(1, self.layers)[0])

    def max_ratio(self, width_multiple: int | None = None, uniform: bool = False) -> float:
        """Return the largest ratio, at which every layer loses all that it can lose."""
        groups, channels = self._amounts(self.width_multiple(width_multiple), uniform)
        return (groups[-1] + channels[-1]) / self.prunable_parameters

    def split(self, ratio: float, width_multiple: int | None, uniform: bool = False) -> dict[str, float]:
        """Return the parameters that a ratio removes from the source with KV groups and with channels.

        KV groups lose the same share as the whole model, as near as whole groups come to the share and as channels can
        make up the difference. With ``uniform``, every layer is left with the same number of units: of the combinations
        of whole groups and whole steps of channels that come near to the ratio, the function chooses the one whose share
        of KV groups is nearest to the share of the whole model.
        """
        wanted, multiple = ratio * self.prunable_parameters, self.width_multiple(width_multiple)
        groups, channels = self._amounts(multiple, uniform)
        share = ratio * sum(layer.kv_groups * self.price("kv_groups", index) for index, layer in enumerate(self.layers))
        if uniform:
            found = []
            for amount in groups:
                above = bisect_left(channels, wanted - amount)
                for rest in channels[max(above - 1, 0) : above + 1]:  # any other misses by more
                    found.append((abs(amount - share), abs(amount + rest - wanted), (amount, float(rest))))
            least = min(miss for _, miss, _ in found)
            near = max(least, min(NEAR * self.prunable_parameters, self.block(width_multiple, uniform) / 2))
            amount, most = min(each for each in found if each[1] <= near)[2]
            return {"kv_groups": amount, "channels": most}
        amount = nearest_amount(share, groups, channels[-1], wanted)
        return {"kv_groups": amount, "channels": min(max(wanted - amount, 0.0), channels[-1])}

    def nearest_ratio(self, target_ratio: float, width_multiple: int | None = None, uniform: bool = False) -> float:
        """Return the ratio nearest to ``target_ratio`` that whole KV groups and whole blocks of channels reach."""
        amounts = self.split(target_ratio, width_multiple, uniform)
        channels, limit = amounts["channels"], self._amounts(self.width_multiple(width_multiple), uniform)[1][-1]
        block = self.block(width_multiple)
        below = min(math.ceil(channels / block - 0.5) * block, limit)  # of two sizes equally near, the smaller is cut
        whole = channels if uniform else min((below, limit), key=lambda size: abs(size - channels))
        return (amounts["kv_groups"] + whole) / self.prunable_parameters

    def block(self, width_multiple: int | None = None, uniform: bool = False) -> int:
        """Return the number of parameters in the largest step of channels; with ``uniform``, of all layers together.

        If channels may not be cut, the largest step is a KV group.
        """
        name = "channels" if "channels" in self.widths else "kv_groups"
        prices = [self.price(name, index) for index in range(len(self.layers))]
        step = self.width_multiple(width_multiple) if name == "channels" else 1
        return step * ((sum if uniform else max)(prices) or 1)

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
            fewest = [amount for amount in self._amounts(self.width_multiple(width_multiple), True)[0] if amount][:1]
            smallest = min(block, *(amount / self.prunable_parameters for amount in fewest), 1.0)
        raise PruningError(
            ErrorCode.RATIO_UNREACHABLE,
            f"This model cannot be pruned by {target_ratio:g}: the nearest ratio that can be met is "
            f"{nearest or smallest:.6f} (at most {self.max_ratio(width_multiple, uniform):.6f}: one KV group and one "
            f"block of {self.width_multiple(width_multiple)} channels stay in every layer"
            f"{', and all layers are alike' if uniform else ''}).",
            field=field,
        )

    def common_units(self, multiple: int, layers: Sequence[LayerShape]) -> tuple[list[int], list[int]]:
        """Return the numbers of KV groups and of channels that every one of ``layers`` can be left with, descending.

        The stock class accepts each number of groups.
        """
        fewest = min((each for each in layers if each.kv_groups), key=lambda each: each.kv_groups, default=layers[0])
        fewer = (fewest.without(gone) for gone in range(max(fewest.kv_groups, 1)))
        width = min((layer.channels_per_expert for layer in layers if layer.channels), default=0)
        channels = list(accumulate((-step for step in channel_steps(width, multiple)), initial=width))
        groups = [layer.kv_groups for layer in fewer if not layer.heads or self.takes_heads(layer)]
        if "kv_groups" not in self.widths:
            groups = groups[:1]
        if "channels" not in self.widths:
            channels = channels[:1]
        return groups, channels

    def _amounts(self, multiple: int, uniform: bool = False) -> tuple[Sequence[int], Sequence[int]]:
        """Return the parameters that can be removed with KV groups and with channels, each ascending.

        Without ``uniform``, of the amounts of channels only none and the most are given.
        """
        if (multiple, uniform) not in self._known_amounts:
            self._known_amounts[multiple, uniform] = self._find_amounts(multiple, uniform)
        return self._known_amounts[multiple, uniform]

    @cached_property
    def _known_amounts(self) -> dict[tuple[int, bool], tuple[Sequence[int], Sequence[int]]]:
        return {}

    def _find_amounts(self, multiple: int, uniform: bool) -> tuple[Sequence[int], Sequence[int]]:
        prices = {name: [self.price(name, index) for index in range(len(self.layers))] for name in WIDTHS}
        if uniform:
            amounts = []
            for name, choices in zip(WIDTHS, self.common_units(multiple, self.layers), strict=True):
                # Most layers are alike, and a million choices for each of a thousand layers would take minutes.
                kinds = Counter((self.units(name, at), price) for at, price in enumerate(prices[name])).items()
                amounts.append([sum(max(own - left, 0) * price * n for (own, price), n in kinds) for left in choices])
            return (amounts[0], amounts[1]) if amounts[0] else ([0], [0])
        most = {name: [self.removable(name, index, multiple) for index in range(len(self.layers))] for name in WIDTHS}
        kinds = Counter(zip(most["kv_groups"], prices["kv_groups"], strict=True)).items()
        steps = sorted((gone / count, price, n) for (count, price), n in kinds for gone in range(1, count + 1))
        groups = accumulate((price for _, price, n in steps for _ in range(n)), initial=0)
        channels = sum(count * price for count, price in zip(most["channels"], prices["channels"], strict=True))
        return list(groups), [0, channels]

    def as_dict(self) -> dict[str, Any]:
        """Return the sizes as JSON-able data for ``POST /v1/models/inspect``."""
        return {
            "family": self.family.name,
            "model_type": self.model_type,
            "hidden_size": self.hidden_size,
            "vocab_size": self.vocab_size,
            "tied_embeddings": self.tied_embeddings,
            "vocabulary_share": self.vocabulary_parameters / self.parameters,
            "parameters": self.parameters,
            "prunable_parameters": self.prunable_parameters,
            "width_multiple": self.width_multiple(None),
            "max_ratio": self.max_ratio(),
            "experts_per_token": self.experts_per_token,
            "structures": {
                name: {"scope": STRUCTURES[name].scope, "summary": STRUCTURES[name].summary}
                for name in self.family.structures
            },
            "layers": [
                {
                    "layer": index,
                    "kv_groups": layer.kv_groups,
                    "heads": layer.heads,
                    "head_dim": layer.head_dim,
                    "channels": layer.channels_per_expert,
                    "experts": layer.experts,
                    "parameters": self.layer_parameters(index),
                    "prices": {name: self.price(name, index) for name in self.family.structures},
                }
                for index, layer in enumerate(self.layers)
            ],
        }
