"""A loaded model of any family, presented as a stack of prunable decoder layers."""

import copy
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from operator import attrgetter
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from secateur.catalog.architectures import Family, LayerShape, ModelShape
from secateur.catalog.structures import LayerCost
from secateur.contract.errors import ErrorCode, PruningError
from secateur.engine.model.experts import Experts
from secateur.engine.model.fused import Fused
from secateur.engine.model.placement import Placement
from secateur.engine.time_limit import encode

if TYPE_CHECKING:
    from secateur.engine.structures.vocabulary import VocabularyCut


class Layer:
    """One decoder layer: its module, the projections that pruning cuts, and its current widths.

    In a mixture of experts, the channels of all experts stand one after the other.
    """

    def __init__(self, module: nn.Module, family: Family, source: LayerShape, cost: LayerCost) -> None:
        """Present ``module``, a layer that has the sizes ``source`` and whose units have the prices ``cost``."""
        self.cost = cost
        self.module = module
        self.family = family
        self.head_dim = source.head_dim
        self.heads_per_group = source.heads_per_group
        self.mixture: Experts | None = None
        """The layer's experts, or ``None`` in a layer without a mixture of experts."""

    def take_apart(self, shape: LayerShape, hidden_size: int) -> None:
        """Replace each fused module by one projection per part, and copy the module's config where it holds widths.

        ``shape`` has the layer's widths; ``hidden_size`` is the model's. The copied config lets the layer have widths
        of its own.
        """
        rows = {self.family.query: shape.attention_width}
        rows |= dict.fromkeys((self.family.key, self.family.value), shape.kv_groups * shape.head_dim)
        rows |= dict.fromkeys(self.family.channel_inputs, shape.channels_per_expert)
        rows |= dict.fromkeys((self.family.attention_output, self.family.channel_output), hidden_size)
        for name, parts in self.family.fused.items():
            if not isinstance(module := self.module.get_submodule(name), Fused):
                block = shape.head_dim if name in self.family.interleaved else None
                fused = Fused(module, {part: rows[f"{name}.{part}"] for part in parts}, block)
                self.module.set_submodule(name, fused)
        if self.family.experts:
            name = self.family.channel_output.rpartition(".")[0]
            module = self.module.get_submodule(name)
            self.mixture = module if isinstance(module, Experts) else Experts(module)
            self.module.set_submodule(name, self.mixture)
        for owner in {path.rpartition(".")[0] for path in self.family.sizes}:
            if (name := owner.removesuffix(".config")) != owner:
                holder = self.module.get_submodule(name)
                holder.config = copy.copy(holder.config)

    def tell_sizes(self) -> None:
        """Set the attributes from which the module's forward reads its widths."""
        for path, size in self.family.sizes.items():
            owner, _, attribute = path.rpartition(".")
            setattr(attrgetter(owner)(self.module), attribute, getattr(self.shape, size))

    def __getitem__(self, projection: str) -> nn.Linear:
        found = self.module.get_submodule(projection)
        assert isinstance(found, nn.Linear)
        return found

    @property
    def projections(self) -> tuple[str, ...]:
        """The names of the family's projections that this layer has; a layer may lack a whole sub-layer."""
        modules = {name for name, module in self.module.named_modules() if isinstance(module, nn.Linear)}
        return tuple(name for name in self.family.projections if name in modules)

    @property
    def attention_output(self) -> nn.Linear:
        """Attention output projection; its input ``[..., heads * head_dim]`` holds the heads' outputs side by side."""
        return self[self.family.attention_output]

    @property
    def channel_output(self) -> nn.Linear:
        """The channels' output projection; its input ``[..., channels]`` holds the channels' activations."""
        return self[self.family.channel_output]

    @property
    def group_width(self) -> int:
        """Number of inputs of the attention output projection that belong to one KV group."""
        return self.heads_per_group * self.head_dim

    @property
    def shape(self) -> LayerShape:
        """The layer's current sizes."""
        attention, channels = (
            self[name].in_features if name in self.projections else 0
            for name in (self.family.attention_output, self.family.channel_output)
        )
        groups, experts = attention // self.group_width, 1 if self.mixture is None else self.mixture.count
        return LayerShape(groups, groups * self.heads_per_group, self.head_dim, channels // experts, experts)


def opening_of(tokenizer: PreTrainedTokenizerBase, family: Family) -> Tensor:
    """Return the token ids ``[opening]`` with which every window of a model begins, see :attr:`Decoder.opening`."""
    return torch.tensor(encode(tokenizer, "") if family.opened else [], dtype=torch.long)


class Decoder:
    """A model, its tokenizer and its decoder layers.

    ``shape`` holds the sizes of the *source* model, except for a vocabulary that was cut; the layers hold their current widths. Modules of the model that
    compute several projections are replaced by :class:`secateur.engine.model.fused.Fused` and
    :class:`secateur.engine.model.experts.Experts`.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        shape: ModelShape,
        placement: Placement | None = None,
    ) -> None:
        """Present ``model``, which ``placement`` moves to its devices; without a placement, it stays where it is."""
        self.model = model
        self.placement = placement or Placement(model.device)
        self.tokenizer = tokenizer
        self.shape = shape
        self.opening = opening_of(tokenizer, shape.family)
        """Token ids ``[opening]`` with which every window begins: the special tokens that the tokenizer puts before a
        text. They are empty unless the model's family needs them."""
        self.read_share = 0.0
        """Share of every measured window that a dynamic model reads first as its prompt; these tokens are not
        predicted."""
        self.vocabulary: VocabularyCut | None = None
        """The cut of the vocabulary, or ``None`` while all tokens are there."""
        modules = model.get_submodule(shape.family.layers)
        assert isinstance(modules, nn.ModuleList)
        self.layers = []
        for index, (module, source, cost) in enumerate(zip(modules, shape.layers, shape.costs, strict=True)):
            layer = Layer(module, shape.family_of(index), source, cost)
            layer.take_apart(source, shape.hidden_size)
            layer.tell_sizes()
            if layer.family.fused or layer.mixture is not None:
                self.hold(layer)  # its projections are new tensors
            self.layers.append(layer)
        self.placement.place(model, modules)

    def hold(self, layer: Layer) -> None:
        """Hold a layer whose tensors changed where the model's layers are held."""
        self.placement.hold(layer.module)

    @contextmanager
    def at_hand(self, layer: Layer) -> Iterator[Layer]:
        """Keep a layer on the device that runs it while the context lasts, see :meth:`Placement.at_hand`."""
        with self.placement.at_hand(layer.module):
            yield layer

    @property
    def device(self) -> torch.device:
        """The device of the embeddings and the head, on which tokens enter and logits leave."""
        return self.placement.device

    @property
    def widths(self) -> list[LayerShape]:
        """The current widths of all layers."""
        return [layer.shape for layer in self.layers]

    @property
    def costs(self) -> Sequence[LayerCost]:
        """What the units of each present layer cost."""
        return [layer.cost for layer in self.layers]

    @property
    def prunable_parameters(self) -> int:
        """Number of parameters in the projections of all layers, computed from their current widths."""
        return sum(cost.parameters(widths) for cost, widths in zip(self.costs, self.widths, strict=True))

    @property
    def projection_parameters(self) -> int:
        """Number of parameters in the projections' tensors; biases that a recovery added are included."""
        return sum(
            parameter.numel()
            for layer in self.layers
            for name in layer.projections
            for parameter in layer[name].parameters()
        )

    @contextmanager
    def routed(self) -> Iterator[None]:
        """Run each expert only on the tokens that the router sends to it, while the context lasts.

        The computation then costs as much as that of the published model.
        """
        mixtures = [layer.mixture for layer in self.layers if layer.mixture is not None]
        for mixture in mixtures:
            mixture.routed = True
        try:
            yield
        finally:
            for mixture in mixtures:
                mixture.routed = False

    @property
    def reached_ratio(self) -> float:
        """Share of the source's prunable parameters that was removed."""
        return 1 - self.prunable_parameters / self.shape.prunable_parameters

    @property
    def parameters(self) -> int:
        """Number of all parameters of the model; tied parameters count once."""
        return sum(parameter.numel() for parameter in self.model.parameters())

    @torch.no_grad()
    def capture(self, tokens: Tensor) -> "Captured":
        """Run ``tokens`` ``[windows, length]`` and return the inputs of every layer."""
        captured = Captured([], [])

        def keep(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            hidden, *others = args
            captured.inputs.append(hidden)
            captured.arguments.append(Arguments(tuple(others), kwargs))

        hooks = [layer.module.register_forward_pre_hook(keep, with_kwargs=True) for layer in self.layers]
        try:
            self.model(tokens, use_cache=False, logits_to_keep=1)
        finally:
            for hook in hooks:
                hook.remove()
        return captured

    @torch.no_grad()
    def enter(self, tokens: Tensor) -> "Entered":
        """Return what enters the first layer for ``tokens`` ``[windows, length]``, and every layer's other arguments.

        No layer is run.
        """
        entered = Entered(torch.empty(0), [])

        def record(hidden: Tensor, arguments: Arguments) -> Tensor:
            entered.hidden = hidden
            entered.arguments.append(arguments)
            return hidden

        with self._layers_replaced(record):
            self.model(tokens, use_cache=False, logits_to_keep=1)
        return entered

    def run_layer(self, captured: "Captured | Entered", index: int, hidden: Tensor) -> Tensor:
        """Return the output of layer ``index`` for the hidden states ``hidden`` ``[windows, length, hidden]``.

        The hidden states may be on another device, such as the host; the output is on the model's device.
        """
        arguments = captured.arguments[index]
        output = self.layers[index].module(hidden.to(self.device), *arguments.others, **arguments.named)
        leaving: Tensor = output[0] if isinstance(output, tuple) else output
        return leaving

    @torch.no_grad()
    def run_batches(self, batches: "Sequence[Entered]", index: int, hidden: list[Tensor]) -> None:
        """Replace the hidden states of each batch by the output of layer ``index``, where they are kept."""
        with self.at_hand(self.layers[index]):
            for number, batch in enumerate(batches):
                hidden[number] = self.run_layer(batch, index, hidden[number]).to(hidden[number].device)

    @torch.no_grad()
    def enter_batches(self, tokens: Tensor, batch_windows: int) -> tuple["list[Entered]", list[Tensor]]:
        """Return the batches of ``tokens`` ``[windows, length]`` and the hidden states that enter the first layer.

        The hidden states are kept where the placement has room for them, and the batches keep none.
        """
        size = tokens.numel() * self.shape.hidden_size * self.model.dtype.itemsize
        store = self.placement.store(size)
        batches = [self.enter(batch) for batch in tokens.split(batch_windows)]
        hidden = [batch.hidden.to(store) for batch in batches]
        for batch in batches:
            batch.hidden = torch.empty(0)
        return batches, hidden

    def head(self, hidden: Tensor) -> Tensor:
        """Return the logits ``[windows, length, vocabulary]`` for ``hidden``, the output of the last layer."""
        hidden = hidden.to(self.device)
        tokens = torch.zeros(hidden.shape[:2], dtype=torch.long, device=hidden.device)
        with self._layers_replaced(lambda entering, arguments: hidden):
            logits: Tensor = self.model(tokens, use_cache=False).logits
        return logits

    @contextmanager
    def _layers_replaced(self, forward: "Callable[[Tensor, Arguments], Tensor]") -> Iterator[None]:
        layers = self.model.get_submodule(self.shape.family.layers)
        assert isinstance(layers, nn.ModuleList)
        real = list(layers)
        try:
            for index, layer in enumerate(real):
                layers[index] = _StandIn(layer, forward)
            yield
        finally:
            for index, layer in enumerate(real):
                layers[index] = layer

    def losses(self, logits: Tensor, tokens: Tensor) -> Tensor:
        """Return the next-token losses ``[windows, predicted]`` of the windows ``tokens`` ``[windows, length]``.

        :func:`token_losses` computes the losses. The tokens of a window's opening are not predicted.
        """
        start = max(len(self.opening) - 1, 0)
        return token_losses(logits[:, start:], tokens[:, start:])

    @torch.no_grad()
    def batch_losses(
        self, tokens: Tensor, batch_windows: int, progress: Callable[[float], None] = lambda share: None
    ) -> Iterator[Tensor]:
        """Yield the next-token losses ``[windows, predicted]`` of each batch of ``tokens`` ``[windows, length]``.

        Each layer runs all batches before the next layer does, so that every layer comes to the device once. Tokens that
        are read first (see ``read_share``) have no loss.
        """
        batches, hidden = self.enter_batches(tokens, batch_windows)
        for index in range(len(self.layers)):
            self.run_batches(batches, index, hidden)
            progress((index + 1) / len(self.layers))
        for batch in tokens.split(batch_windows):
            losses = self.losses(self.head(hidden.pop(0)), batch)
            yield losses[:, -(tokens.shape[1] - self.read_tokens(tokens)) :] if self.read_share else losses

    def read_tokens(self, tokens: Tensor) -> int:
        """Return how many tokens of each window in ``tokens`` ``[windows, length]`` are read first."""
        return max(int(tokens.shape[1] * self.read_share), len(self.opening), 1)

    def predicted(self, tokens: Tensor) -> int:
        """Return how many losses the windows ``tokens`` ``[windows, length]`` have together."""
        return len(tokens) * (tokens.shape[1] - max(len(self.opening), 1))

    def resume(self, captured: "Captured", start: int, hidden: Tensor) -> Tensor:
        """Return the logits ``[windows, length, vocabulary]`` when ``hidden`` enters layer ``start``."""
        for index in range(start, len(self.layers)):
            hidden = self.run_layer(captured, index, hidden)
        return self.head(hidden)


@dataclass(frozen=True)
class Arguments:
    """The arguments of a layer beside the hidden states, by position and by name: masks, rotary embeddings."""

    others: tuple[Any, ...]
    named: dict[str, Any]


@dataclass
class Entered:
    """Hidden states ``[windows, length, hidden]`` that enter the first layer, and every layer's other arguments."""

    hidden: Tensor
    arguments: list[Arguments]


@dataclass
class Captured:
    """Hidden states ``[windows, length, hidden]`` that enter each layer, and every layer's other arguments."""

    inputs: list[Tensor]
    arguments: list[Arguments]


class _StandIn(nn.Module):
    """A module in place of a layer, which calls ``replaced`` with the layer's arguments and returns the result."""

    def __init__(self, layer: nn.Module, replaced: Callable[[Tensor, Arguments], Tensor]) -> None:
        super().__init__()
        self.layer = layer
        self._replaced = replaced

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:  # models read attributes of their layers, such as the attention type
            return getattr(super().__getattr__("layer"), name)

    def forward(self, hidden_states: Tensor, *others: Any, **named: Any) -> Tensor:
        return self._replaced(hidden_states, Arguments(others, named))


def token_losses(logits: Tensor, tokens: Tensor) -> Tensor:
    """Return the next-token cross-entropy ``[windows, length - 1]`` in nats.

    The computation is in float32 or better, whatever the model's dtype.
    """
    precise = logits[:, :-1].flatten(0, 1).to(torch.promote_types(logits.dtype, torch.float32))
    flat = nn.functional.cross_entropy(precise, tokens[:, 1:].flatten(), reduction="none")
    return flat.view(tokens.shape[0], -1)


def check_gradients(gradients: Iterable[Tensor]) -> None:
    """Check that all gradients are finite, because no score can be computed from others.

    Raises:
        PruningError: ``loss_not_finite`` when a gradient is NaN or infinite.
    """
    if not all(torch.isfinite(gradient).all() for gradient in gradients):
        raise PruningError(
            ErrorCode.LOSS_NOT_FINITE,
            "The loss's gradients overflow in this dtype. Try dtype 'bfloat16' or 'float32'.",
            field="dtype",
        )
