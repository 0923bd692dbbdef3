"""Hidden states streaming layer by layer through the model as it is being cut, and beside it through the model it was.

A layer is scored on, and fitted to, what the layers cut before it send on, so an error meets every layer after it. Kept
are one layer's second moments and three rows of hidden states, never the activations of all layers.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from secateur.engine.model.decoder import Decoder, Layer, Structure


@dataclass
class Moments:
    """Sums over tokens of the inputs x that one expert gives an output projection, in float32 on the model's device.

    But for a mixture's channels there is one expert, which has all inputs. Where there is a reference, tokens are weighted by the inverse mean square of its hidden states, which is what the next
    norm divides by; else every weight is 1.
    """

    weight: float
    """Σ w."""
    inputs: Tensor
    """Σ w·x, ``[in]``."""
    gram: Tensor
    """Σ w·x·xᵀ, ``[in, in]``."""
    entering: Tensor
    """Σ w·z² of what enters the structure's input projections, ``[hidden]``, over the tokens that are sent to the expert."""
    missing: Tensor | None
    """Σ w·x·eᵀ, ``[in, hidden]``: e is what hidden states lack of the reference's when this part is left as it is, in equal
    parts for all experts that the token is sent to."""

    @property
    def mean(self) -> Tensor:
        """``[in]``."""
        return self.inputs / self.weight

    @property
    def covariance(self) -> Tensor:
        """``[in, in]``."""
        return self.gram / self.weight - torch.outer(self.mean, self.mean)


class LayerStream:
    """``tokens`` ``[windows, length]`` on their way through the layers of ``decoder``.

    ``reference`` is a model that nothing was cut from, or ``decoder`` itself: its layers are run on the reference's hidden
    states before they are cut.
    """

    def __init__(self, decoder: Decoder, tokens: Tensor, batch_windows: int, reference: Decoder | None) -> None:
        # Unless outputs are added as they are, what the hidden states lack is no target of a projection.
        self._decoder, self._reference = decoder, reference if decoder.shape.family.additive else None
        self._entered = [decoder.enter(batch) for batch in tokens.split(batch_windows)]
        self.hidden = [entered.hidden for entered in self._entered]
        """What enters the next layer, by batch: ``[windows, length, hidden]``."""
        self._targets = {"kv_groups": self.hidden, "channels": self.hidden}
        self._index = -1

    @torch.no_grad()
    def layers(self, cut: bool = True) -> Iterator[Layer]:
        """Each layer in turn, to be cut; then the hidden states pass through what is left of it.

        Without ``cut`` the layers stay as they are, and the hidden states those of the reference.
        """
        for index, layer in enumerate(self._decoder.layers):
            self._index = index
            if self._reference is not None:
                self._run_reference(self._reference)
            yield layer
            if cut or self._reference is None:
                self.hidden = [self._run(self._decoder, batch, hidden) for batch, hidden in enumerate(self.hidden)]
            else:
                self.hidden = self._targets["channels"]

    @torch.no_grad()
    def moments(self, structure: Structure) -> list[Moments]:
        """Of this layer's ``structure``, expert by expert, as the layer is now: heads that were cut before channels are asked for
        are gone."""
        layer = self._decoder.layers[self._index]
        experts, weight = layer.experts(structure), layer.output(structure).weight
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
        for batch, hidden in enumerate(self.hidden):
            with _seen(layer, structure) as seen:
                self._run(self._decoder, batch, hidden)
            given = seen.inputs.flatten(0, -2).float().chunk(experts, 1)
            entering = seen.entering.flatten(0, -2).float()
            sent = torch.stack([inputs.any(1) for inputs in given], 1)  # [tokens, experts]
            weights = torch.ones(len(entering), 1, device=weight.device)
            if self._reference is not None:
                target = self._targets[structure][batch].flatten(0, 1).float()
                weights = 1 / target.square().mean(1, keepdim=True)
                before = hidden if structure == "kv_groups" else hidden + seen.attended
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
        return decoder.run_layer(self._entered[batch], self._index, hidden)

    def _run_reference(self, reference: Decoder) -> None:
        """Targets of this layer: what its attention leaves in the residual stream, and what leaves the layer."""
        layer, entering = reference.layers[self._index], self._targets["channels"]
        attended: list[Tensor] = []
        hook = layer.attention_output.register_forward_hook(lambda _, args, output: attended.append(output))
        try:
            leaving = [self._run(reference, batch, hidden) for batch, hidden in enumerate(entering)]
        finally:
            hook.remove()
        self._targets = {
            "kv_groups": [hidden + output for hidden, output in zip(entering, attended, strict=True)],
            "channels": leaving,
        }


class _Enough(Exception):
    """What was wanted of a layer is seen: the rest need not run."""


@dataclass
class _Seen:
    inputs: Tensor
    """Of the structure's output projection: ``[windows, length, in]``."""
    output: Tensor
    """What that makes of them: ``[windows, length, hidden]``."""
    entering: Tensor
    """The structure's input projections: ``[windows, length, hidden]``."""
    attended: Tensor
    """What attention adds to the residual stream (channels alone): ``[windows, length, hidden]``."""


@contextmanager
def _seen(layer: Layer, structure: Structure) -> Iterator[_Seen]:
    """Run a layer within this context no further than the structure's output projection, and see what passes it."""
    empty = torch.empty(0)
    seen = _Seen(empty, empty, empty, empty)

    def stop(_: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        seen.inputs, seen.output = args[0], output
        raise _Enough

    def enter(_: nn.Module, args: tuple[Tensor, ...]) -> None:
        seen.entering = args[0]

    def attend(_: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        seen.attended = output

    hooks = [
        layer.output(structure).register_forward_hook(stop),
        layer.inputs(structure)[0].register_forward_pre_hook(enter),
        layer.attention_output.register_forward_hook(attend),
    ]
    try:
        yield seen
    except _Enough:
        pass
    finally:
        for hook in hooks:
            hook.remove()
