"""The layer stream: hidden states pass layer by layer through a model while the model is cut.

Beside it, the hidden states of the reference model pass through the same layers. Each layer is scored and recovered on
the output of the layers that were cut before, so an error reaches every later layer. The stream keeps the second
moments of one layer and three sets of hidden states, never the activations of all layers.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from secateur.engine.model.decoder import Decoder, Layer
from secateur.engine.structures import WIDTHS, Width


@dataclass
class Moments:
    """Sums over tokens of the inputs x of an output projection, for one expert, in float32 on the model's device.

    Structures other than the channels of a mixture have one expert, which has all inputs. With a reference, each token
    has the weight w, the inverse mean square of the reference's hidden states, by which the next norm divides. Without
    a reference, every weight is 1.
    """

    weight: float
    """Σ w."""
    inputs: Tensor
    """Σ w·x, ``[in]``."""
    gram: Tensor
    """Σ w·x·xᵀ, ``[in, in]``."""
    entering: Tensor
    """Σ w·z² of the inputs z of the structure's input projections, ``[hidden]``, over the tokens that are sent to the
    expert."""
    missing: Tensor | None
    """Σ w·x·eᵀ, ``[in, hidden]``, or ``None`` without a reference. The error e is the reference's hidden states less
    the model's hidden states when this structure is left as it is; all experts to which the token is sent have equal
    shares of e."""

    @property
    def mean(self) -> Tensor:
        """Weighted mean of the inputs, ``[in]``."""
        return self.inputs / self.weight

    @property
    def covariance(self) -> Tensor:
        """Weighted covariance of the inputs, ``[in, in]``."""
        return self.gram / self.weight - torch.outer(self.mean, self.mean)


class LayerStream:
    """A pass of ``tokens`` ``[windows, length]`` through the layers of ``decoder``.

    ``reference`` is a model that nothing was cut from, or ``decoder`` itself, whose layers are then run on the
    reference's hidden states before the layers are cut.
    """

    def __init__(self, decoder: Decoder, tokens: Tensor, batch_windows: int, reference: Decoder | None) -> None:
        # A projection can be fitted to missing hidden states only if its output is added to them without a norm.
        self._decoder, self._reference = decoder, reference if decoder.shape.family.additive else None
        self._batches, self.hidden = decoder.enter_batches(tokens, batch_windows)
        """The hidden states that enter the next layer, by batch: ``[windows, length, hidden]``."""
        self._targets = {"attention": list(self.hidden), "feed_forward": list(self.hidden)}
        self._index = -1

    @torch.no_grad()
    def layers(self, cut: bool = True) -> Iterator[Layer]:
        """Yield each layer to be cut, and then run the hidden states through the rest of the layer.

        With ``cut`` false, the layers are not cut, and the hidden states are those of the reference.
        """
        for index, layer in enumerate(self._decoder.layers):
            self._index = index
            with self._decoder.at_hand(layer):
                if self._reference is not None:
                    self._run_reference(self._reference)
                yield layer
                if cut or self._reference is None:
                    self._decoder.run_batches(self._batches, index, self.hidden)
                else:
                    self.hidden = list(self._targets["feed_forward"])

    @torch.no_grad()
    def moments(self, name: str) -> list[Moments]:
        """Return the moments of this layer's width structure ``name`` for each expert, for the layer as it is now.

        KV groups that were cut earlier do not count when the moments of the channels are computed.
        """
        layer, structure = self._decoder.layers[self._index], WIDTHS[name]
        experts, weight = structure.experts(layer), structure.output(layer).weight
        size, hidden_size = weight.shape[1] // experts, weight.shape[0]

        def zeros(*shape: int) -> Tensor:
            return torch.zeros(shape, device=weight.device)

        found = [
            Moments(
                0.0,
                zeros(size),
                zeros(size, size),
                zeros(hidden_size),
                zeros(size, hidden_size) if self._reference is not None else None,
            )
            for _ in range(experts)
        ]
        for batch, kept in enumerate(self.hidden):
            with _seen(layer, structure) as seen:
                self._run(self._decoder, batch, kept)
            hidden = kept.to(weight.device)
            given = seen.inputs.flatten(0, -2).float().chunk(experts, 1)
            entering = seen.entering.flatten(0, -2).float()
            sent = torch.stack([inputs.any(1) for inputs in given], 1)  # [tokens, experts]
            weights = torch.ones(len(entering), 1, device=weight.device)
            if self._reference is not None:
                target = self._targets[structure.part][batch].to(weight.device).flatten(0, 1).float()
                weights = 1 / target.square().mean(1, keepdim=True)
                before = hidden if seen.attended is None else hidden + seen.attended
                lacking = target - before.flatten(0, 1).float() - seen.output.flatten(0, -2).float()
                lacking /= sent.sum(1, keepdim=True).clamp_min(1)
            for moments, inputs, own in zip(found, given, sent.T, strict=True):
                weighted = inputs * weights
                moments.weight += float(weights.sum())
                moments.inputs += weighted.sum(0)
                moments.gram += weighted.T @ inputs
                moments.entering += (entering.square() * weights)[own].sum(0)
                if moments.missing is not None:
                    moments.missing += weighted.T @ lacking
        return found

    def _run(self, decoder: Decoder, batch: int, hidden: Tensor) -> Tensor:
        return decoder.run_layer(self._batches[batch], self._index, hidden)

    def _run_reference(self, reference: Decoder) -> None:
        """Run this layer of the reference and keep its hidden states after attention and after the layer."""
        layer, after, leaving = reference.layers[self._index], self._targets["attention"], self._targets["feed_forward"]
        attended: list[Tensor] = []
        with reference.at_hand(layer), _attending(layer, attended.append):
            for batch, entering in enumerate(leaving):
                leaving[batch] = self._run(reference, batch, entering).to(entering.device)
                after[batch] = entering + attended.pop().to(entering.device) if attended else entering


class _Enough(Exception):
    """Raised to stop a layer's forward when all wanted tensors were seen."""


@dataclass
class _Seen:
    """The tensors that :func:`_seen` records in a layer's forward."""

    inputs: Tensor
    """Inputs of the structure's output projection: ``[windows, length, in]``."""
    output: Tensor
    """Output of the structure's output projection: ``[windows, length, hidden]``."""
    entering: Tensor
    """Inputs of the structure's input projections: ``[windows, length, hidden]``."""
    attended: Tensor | None = None
    """Output of attention that is added to the hidden states before the structure, ``[windows, length, hidden]``."""


@contextmanager
def _attending(layer: Layer, seen: Callable[[Tensor], None]) -> Iterator[None]:
    """Call ``seen`` with the output of the layer's attention, if it has one, whenever the layer runs in this context."""
    if layer.family.attention_output not in layer.projections:
        yield
        return
    hook = layer.attention_output.register_forward_hook(lambda _, args, output: seen(output))
    try:
        yield
    finally:
        hook.remove()


@contextmanager
def _seen(layer: Layer, structure: Width) -> Iterator[_Seen]:
    """Stop a layer's forward at the structure's output projection in this context, and record its tensors."""
    empty = torch.empty(0)
    seen = _Seen(empty, empty, empty)

    def stop(_: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        seen.inputs, seen.output = args[0], output
        raise _Enough

    def enter(_: nn.Module, args: tuple[Tensor, ...]) -> None:
        seen.entering = args[0]

    def attend(output: Tensor) -> None:
        seen.attended = output

    hooks = [
        structure.output(layer).register_forward_hook(stop),
        structure.inputs(layer)[0].register_forward_pre_hook(enter),
    ]
    try:
        with _attending(layer, attend):
            yield seen
    except _Enough:
        pass
    finally:
        for hook in hooks:
            hook.remove()
