"""Hidden states streaming layer by layer through the model as it is being cut, and beside it through the model it was.

A layer is scored on, and fitted to, what the layers cut before it send on, so an error meets every layer after it. Kept
are one layer's second moments and three rows of hidden states, never the activations of all layers.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from workers.engine.decoder import Decoder, Layer, Part


@dataclass
class Moments:
    """Sums over tokens of an output projection's inputs x, in float32 on the model's device.

    Where there is a reference, tokens are weighted by the inverse mean square of its hidden states, which is what the next
    norm divides by; else every weight is 1.
    """

    weight: float
    """Σ w."""
    inputs: Tensor
    """Σ w·x, ``[in]``."""
    gram: Tensor
    """Σ w·x·xᵀ, ``[in, in]``."""
    entering: Tensor
    """Σ w·z² of what enters the part's input projections, ``[hidden]``."""
    missing: Tensor | None
    """Σ w·x·eᵀ, ``[in, hidden]``: e is what hidden states lack of the reference's when this part is left as it is."""

    @property
    def mean(self) -> Tensor:
        """``[in]``."""
        return self.inputs / self.weight

    @property
    def covariance(self) -> Tensor:
        """``[in, in]``."""
        return self.gram / self.weight - torch.outer(self.mean, self.mean)


class Sweep:
    """``tokens`` ``[windows, length]`` on their way through the layers of ``decoder``.

    ``reference`` is a model that nothing was cut from, or ``decoder`` itself: its layers are run on the reference's hidden
    states before they are cut.
    """

    def __init__(self, decoder: Decoder, tokens: Tensor, batch_windows: int, reference: Decoder | None) -> None:
        additive = (
            not decoder.shape.family.norms_outputs
        )  # else what the hidden states lack is no target of a projection
        self._decoder, self._reference = decoder, reference if additive else None
        self._entered = [decoder.enter(batch) for batch in tokens.split(batch_windows)]
        self.hidden = [entered.hidden for entered in self._entered]
        """What enters the next layer, by batch: ``[windows, length, hidden]``."""
        self._targets = {"heads": self.hidden, "channels": self.hidden}
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
    def moments(self, part: Part) -> Moments:
        """Of this layer's ``part``, as the layer is now: heads that were cut before channels are asked for are gone."""
        layer = self._decoder.layers[self._index]
        output = layer.output(part)
        device, size, hidden_size = output.weight.device, output.in_features, output.out_features
        moments = Moments(
            0.0,
            torch.zeros(size, device=device),
            torch.zeros(size, size, device=device),
            torch.zeros(hidden_size, device=device),
            torch.zeros(size, hidden_size, device=device) if self._reference is not None else None,
        )
        for batch, hidden in enumerate(self.hidden):
            with _seen(layer, part) as seen:
                self._run(self._decoder, batch, hidden)
            inputs, entering = seen.inputs.flatten(0, -2).float(), seen.entering.flatten(0, -2).float()
            weights = torch.ones(len(inputs), 1, device=device)
            if moments.missing is not None:
                target = self._targets[part][batch].flatten(0, 1).float()
                weights = 1 / target.square().mean(1, keepdim=True)
                before = hidden if part == "heads" else hidden + seen.attended
                moments.missing += (inputs * weights).T @ (target - before.flatten(0, 1).float())
            moments.weight += float(weights.sum())
            moments.inputs += (inputs * weights).sum(0)
            moments.gram += (inputs * weights).T @ inputs
            moments.entering += (entering.square() * weights).sum(0)
        if moments.missing is not None:  # what the part gives itself is linear in the inputs: no need to run it
            moments.missing -= moments.gram @ output.weight.float().T
            if output.bias is not None:
                moments.missing -= torch.outer(moments.inputs, output.bias.float())
        return moments

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
            "heads": [hidden + output for hidden, output in zip(entering, attended, strict=True)],
            "channels": leaving,
        }


class _Enough(Exception):
    """What was wanted of a layer is seen: the rest need not run."""


@dataclass
class _Seen:
    inputs: Tensor
    """Of the part's output projection: ``[windows, length, in]``."""
    entering: Tensor
    """The part's input projections: ``[windows, length, hidden]``."""
    attended: Tensor
    """What attention adds to the residual stream (channels alone): ``[windows, length, hidden]``."""


@contextmanager
def _seen(layer: Layer, part: Part) -> Iterator[_Seen]:
    """Run a layer within this context no further than the part's output projection, and see what reaches it."""
    empty = torch.empty(0)
    seen = _Seen(empty, empty, empty)

    def stop(_: nn.Module, args: tuple[Tensor, ...]) -> None:
        seen.inputs = args[0]
        raise _Enough

    def enter(_: nn.Module, args: tuple[Tensor, ...]) -> None:
        seen.entering = args[0]

    def attend(_: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        seen.attended = output

    hooks = [
        layer.output(part).register_forward_pre_hook(stop),
        layer.inputs(part)[0].register_forward_pre_hook(enter),
        layer.attention_output.register_forward_hook(attend),
    ]
    try:
        yield seen
    except _Enough:
        pass
    finally:
        for hook in hooks:
            hook.remove()
