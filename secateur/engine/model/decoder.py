"""A loaded model seen as a stack of prunable decoder layers, whatever its family."""

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from operator import attrgetter
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from secateur.catalog.architectures import Family, LayerShape, ModelShape
from secateur.contract.errors import ErrorCode, PruningError
from secateur.engine.model.experts import Experts
from secateur.engine.model.fused import Fused

Structure = Literal["kv_groups", "channels"]
STRUCTURES: tuple[Structure, Structure] = ("kv_groups", "channels")


class Layer:
    """One decoder layer: its module, the projections that pruning cuts, and its widths now.

    Its two parts, heads and channels, have the same make: input projections with rows for each unit, and an output
    projection with columns for it. A mixture's channels are those of its experts, one after the other.
    """

    def __init__(self, module: nn.Module, family: Family, head_dim: int, heads_per_group: int) -> None:
        self.module = module
        self.family = family
        self.head_dim = head_dim
        self.heads_per_group = heads_per_group
        self.mixture: Experts | None = None
        """Its experts, where it has any."""

    def take_apart(self, shape: LayerShape, hidden_size: int) -> None:
        """Make of the module's fused projections one for each part, and its config its own where it keeps widths there."""
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
        """Set the attributes from which the module's forward takes its widths."""
        for path, size in self.family.sizes.items():
            owner, _, attribute = path.rpartition(".")
            setattr(attrgetter(owner)(self.module), attribute, getattr(self.shape, size))

    def __getitem__(self, projection: str) -> nn.Linear:
        found = self.module.get_submodule(projection)
        assert isinstance(found, nn.Linear)
        return found

    @property
    def attention_output(self) -> nn.Linear:
        """Its input is the heads' outputs side by side: ``[..., heads * head_dim]``."""
        return self[self.family.attention_output]

    @property
    def channel_output(self) -> nn.Linear:
        """Its input is the channels' activations: ``[..., channels]``."""
        return self[self.family.channel_output]

    @property
    def group_width(self) -> int:
        """Inputs of the attention output projection that belong to one KV group."""
        return self.heads_per_group * self.head_dim

    @property
    def kv_groups(self) -> int:
        return self.attention_output.in_features // self.group_width

    @property
    def channels(self) -> int:
        return self.channel_output.in_features

    def experts(self, structure: Structure) -> int:
        """Of so many experts are the part's units, an equal share of each."""
        return self.mixture.count if structure == "channels" and self.mixture is not None else 1

    def inputs(self, structure: Structure) -> list[nn.Linear]:
        """The structure's input projections: query, key and value, or those of the channels."""
        names = self.family.attention_inputs if structure == "kv_groups" else self.family.channel_inputs
        return [self[name] for name in names]

    def output(self, structure: Structure) -> nn.Linear:
        """The structure's output projection."""
        return self.attention_output if structure == "kv_groups" else self.channel_output

    def width(self, structure: Structure) -> int:
        """Inputs of the output projection that belong to one unit."""
        return self.group_width if structure == "kv_groups" else 1

    def units(self, structure: Structure) -> int:
        return self.output(structure).in_features // self.width(structure)

    @property
    def shape(self) -> LayerShape:
        groups = self.kv_groups
        experts = self.experts("channels")
        return LayerShape(groups, groups * self.heads_per_group, self.head_dim, self.channels // experts, experts)


class Decoder:
    """The model, its tokenizer and its layers. ``shape`` is that of the *source*; layers tell their widths now.

    Modules of the model that compute several projections are replaced by :class:`secateur.engine.model.fused.Fused` and
    :class:`secateur.engine.model.experts.Experts`.
    """

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, shape: ModelShape) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.shape = shape
        opening = tokenizer("")["input_ids"] if shape.family.opened else []
        self.opening = torch.tensor(opening, dtype=torch.long)
        """Ids ``[opening]`` that every window begins with: what the tokenizer puts before a text, where the family needs it."""
        self.read_share = 0.0
        """Of a window that is measured, the share that is read first, and not predicted: a dynamic model's prompt."""
        modules = model.get_submodule(shape.family.layers)
        assert isinstance(modules, nn.ModuleList)
        first = shape.layers[0]
        self.layers = [Layer(module, shape.family, first.head_dim, first.heads_per_group) for module in modules]
        for layer, widths in zip(self.layers, shape.layers, strict=True):
            layer.take_apart(widths, shape.hidden_size)

    @property
    def device(self) -> torch.device:
        return self.model.device

    @property
    def widths(self) -> list[LayerShape]:
        """Of all layers, now."""
        return [layer.shape for layer in self.layers]

    @property
    def prunable_parameters(self) -> int:
        """Parameters in the projections of all layers, by their widths now."""
        return sum(self.shape.layer_parameters(widths) for widths in self.widths)

    @property
    def projection_parameters(self) -> int:
        """Counted in the projections themselves: biases that a recovery added are among them."""
        return sum(
            parameter.numel()
            for layer in self.layers
            for name in layer.family.projections
            for parameter in layer[name].parameters()
        )

    @contextmanager
    def routed(self) -> Iterator[None]:
        """While the context lasts experts run on the tokens sent to them alone, which costs what the published model costs."""
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
        """Share of the source's prunable parameters that is gone."""
        return 1 - self.prunable_parameters / self.shape.prunable_parameters

    @property
    def parameters(self) -> int:
        """All parameters; tied ones count once."""
        return sum(parameter.numel() for parameter in self.model.parameters())

    @torch.no_grad()
    def capture(self, tokens: Tensor) -> "Captured":
        """Run ``tokens`` ``[windows, length]`` and keep what entered each layer."""
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
        """What enters the first layer for ``tokens`` ``[windows, length]``, and the arguments of every layer. Runs no layer."""
        entered = Entered(torch.empty(0), [])

        def record(hidden: Tensor, arguments: Arguments) -> Tensor:
            entered.hidden = hidden
            entered.arguments.append(arguments)
            return hidden

        with self._layers_replaced(record):
            self.model(tokens, use_cache=False, logits_to_keep=1)
        return entered

    def run_layer(self, captured: "Captured | Entered", index: int, hidden: Tensor) -> Tensor:
        """What leaves layer ``index`` when ``hidden`` ``[windows, length, hidden]`` enters it."""
        arguments = captured.arguments[index]
        output = self.layers[index].module(hidden, *arguments.others, **arguments.named)
        return output[0] if isinstance(output, tuple) else output

    def head(self, hidden: Tensor) -> Tensor:
        """Logits ``[windows, length, vocabulary]`` that the model makes of what leaves the last layer."""
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
        """Next-token losses ``[windows, predicted]`` of windows ``tokens`` ``[windows, length]``, as :func:`token_losses`.

        Of their opening no token is predicted.
        """
        start = max(len(self.opening) - 1, 0)
        return token_losses(logits[:, start:], tokens[:, start:])

    def window_losses(self, tokens: Tensor) -> Tensor:
        """Next-token losses ``[windows, predicted]`` of windows ``tokens`` ``[windows, length]``, of what is not read first."""
        losses = self.losses(self.model(tokens, use_cache=False).logits, tokens)
        return losses[:, -(tokens.shape[1] - self.read_tokens(tokens)) :] if self.read_share else losses

    def read_tokens(self, tokens: Tensor) -> int:
        """How many tokens of each of the windows ``[windows, length]`` are read first."""
        return max(int(tokens.shape[1] * self.read_share), len(self.opening), 1)

    def predicted(self, tokens: Tensor) -> int:
        """How many losses the windows ``tokens`` ``[windows, length]`` have."""
        return len(tokens) * (tokens.shape[1] - max(len(self.opening), 1))

    def resume(self, captured: "Captured", start: int, hidden: Tensor) -> Tensor:
        """Logits ``[windows, length, vocabulary]`` from ``hidden`` entering layer ``start``."""
        for index in range(start, len(self.layers)):
            hidden = self.run_layer(captured, index, hidden)
        return self.head(hidden)


@dataclass(frozen=True)
class Arguments:
    """What a layer is called with beside the hidden states, by place and by name: masks, rotary embeddings."""

    others: tuple[Any, ...]
    named: dict[str, Any]


@dataclass
class Entered:
    """Hidden states ``[windows, length, hidden]`` entering the first layer, and every layer's other arguments."""

    hidden: Tensor
    arguments: list[Arguments]


@dataclass
class Captured:
    """Hidden states ``[windows, length, hidden]`` entering each layer, and its other arguments."""

    inputs: list[Tensor]
    arguments: list[Arguments]


class _StandIn(nn.Module):
    """In a layer's place: what leaves it is told by ``replaced``, given what it is called with."""

    def __init__(self, layer: nn.Module, replaced: Callable[[Tensor, Arguments], Tensor]) -> None:
        super().__init__()
        self.layer = layer
        self._replaced = replaced

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:  # models ask their layers what kind they are
            return getattr(super().__getattr__("layer"), name)

    def forward(self, hidden_states: Tensor, *others: Any, **named: Any) -> Tensor:
        return self._replaced(hidden_states, Arguments(others, named))


@contextmanager
def gated(layer: Layer, kv_groups: Tensor | None = None, channels: Tensor | None = None) -> Iterator[None]:
    """Multiply each unit's output by its gate while the context lasts.

    ``kv_groups`` is ``[windows, kv_groups]``, ``channels`` ``[windows, channels]``; one row for all windows broadcasts.
    Gate 1 leaves a unit alone, gate 0 shields it, and the loss's gradient with respect to a gate is PIEM's ∂L/∂u.
    """
    gates: Mapping[nn.Linear, Tensor | None] = {
        layer.attention_output: None if kv_groups is None else kv_groups.repeat_interleave(layer.group_width, dim=1),
        layer.channel_output: channels,
    }
    hooks = [
        module.register_forward_pre_hook(lambda _, args, gate=gate: (_times(args[0], gate.to(args[0].dtype)),))
        for module, gate in gates.items()
        if gate is not None
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _times(inputs: Tensor, gate: Tensor) -> Tensor:
    """``gate`` ``[windows, in]`` or ``[1, in]`` times ``inputs`` ``[windows, length, in]``, also where a layer calls its
    projections with ``[windows * length, in]``."""
    return (inputs.reshape(len(gate), -1, gate.shape[1]) * gate[:, None]).view_as(inputs)


def token_losses(logits: Tensor, tokens: Tensor) -> Tensor:
    """Next-token cross-entropy in nats, ``[windows, length - 1]``, in float32 or better whatever the model's dtype."""
    precise = logits[:, :-1].flatten(0, 1).to(torch.promote_types(logits.dtype, torch.float32))
    flat = nn.functional.cross_entropy(precise, tokens[:, 1:].flatten(), reduction="none")
    return flat.view(tokens.shape[0], -1)


def check_gradients(gradients: Iterable[Tensor]) -> None:
    """Refuse what no score can be made of.

    Raises:
        PruningError: ``loss_not_finite`` when one is NaN or infinite.
    """
    if not all(torch.isfinite(gradient).all() for gradient in gradients):
        raise PruningError(
            ErrorCode.LOSS_NOT_FINITE,
            "The loss's gradients overflow in this dtype. Try dtype 'bfloat16' or 'float32'.",
            field="dtype",
        )
