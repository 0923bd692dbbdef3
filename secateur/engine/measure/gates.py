"""The effect on the loss of closing the gate of a unit.

The gradients of all gates are computed in one pass; exact shielding closes the gates one by one. Source: PIEM + LSPS
(Wang), section 3.2: ΔL(u) and ∂L/∂u, where u is the unit's gate m at m = 1.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from secateur.engine.model.decoder import Decoder, check_gradients, gated

Progress = Callable[[float], None]


@dataclass(frozen=True)
class GateStatistics:
    """Statistics of the gates of one layer: ``[kv_groups]`` and ``[channels]``, float64 on the CPU.

    ``gradient`` is ∂L/∂m and ``curvature`` the empirical Fisher estimate of ∂²L/∂m², where the loss L is the mean token
    loss in nats.
    """

    kv_group_gradient: Tensor
    kv_group_curvature: Tensor
    channel_gradient: Tensor
    channel_curvature: Tensor

    @property
    def kv_group_loss_change(self) -> Tensor:
        """Estimated change of the loss when a KV group is removed, ``[kv_groups]``, in nats."""
        return estimated_loss_change(self.kv_group_gradient, self.kv_group_curvature)

    @property
    def channel_loss_change(self) -> Tensor:
        """Estimated change of the loss when a channel is removed, ``[channels]``, in nats."""
        return estimated_loss_change(self.channel_gradient, self.channel_curvature)


def estimated_loss_change(gradient: Tensor, curvature: Tensor) -> Tensor:
    """Return ΔL(u) ≈ −g + ½·h, the second-order Taylor expansion of the loss from gate 1 to gate 0."""
    return -gradient + curvature / 2


def gate_statistics(decoder: Decoder, tokens: Tensor, batch_windows: int, progress: Progress) -> list[GateStatistics]:
    """Compute the gradient and the curvature of every gate over ``tokens`` ``[windows, length]``.

    The computation takes two forward passes and one backward pass. Each window has gates of its own, so one backward
    pass gives the gradients of each window. The loss is summed over tokens, which keeps gradients near 1, so that
    float16 can represent them. The curvature is the mean over tokens of g²; the summed gradient of a window stands for
    the independent gradients of its tokens.

    The backward pass goes layer by layer and runs each layer again on the hidden states that entered the layer. Peak
    memory is therefore the activations of one layer, not of all layers.

    Raises:
        PruningError: ``loss_not_finite`` when a gradient is NaN or infinite.
    """
    totals = [
        [
            torch.zeros(n, dtype=torch.float64)
            for n in (layer.kv_groups, layer.kv_groups, layer.channels, layer.channels)
        ]
        for layer in decoder.layers
    ]
    for start in range(0, len(tokens), batch_windows):
        batch = tokens[start : start + batch_windows]
        for sums, gradients in zip(reversed(totals), _gradients_from_the_end(decoder, batch), strict=True):
            for kind, gradient in enumerate(gradients):
                by_window = gradient.double().cpu()
                sums[2 * kind] += by_window.sum(0)
                sums[2 * kind + 1] += by_window.square().sum(0)
        progress(min(start + batch_windows, len(tokens)) / len(tokens))
    check_gradients(total for sums in totals for total in sums)
    count = decoder.predicted(tokens)
    return [GateStatistics(*(total / count for total in sums)) for sums in totals]


def _gradients_from_the_end(decoder: Decoder, batch: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield the gradients of each layer's gates, last layer first: ``[windows, units]`` for both structures.

    The gradient of a window is that of the window's summed loss.
    """
    captured = decoder.capture(batch)
    upstream: Tensor | None = None
    for index in reversed(range(len(decoder.layers))):
        layer, hidden = decoder.layers[index], captured.inputs[index].detach().requires_grad_()
        gates = [
            torch.ones(len(batch), n, device=decoder.device, requires_grad=True)
            for n in (layer.kv_groups, layer.channels)
        ]
        with torch.enable_grad(), gated(layer, *gates):
            output = decoder.run_layer(captured, index, hidden)
            if upstream is None:
                output = decoder.losses(decoder.head(output), batch).sum()
            upstream, heads, channels = torch.autograd.grad(output, [hidden, *gates], upstream)
        yield heads, channels


@torch.no_grad()
def shielded_loss_change(decoder: Decoder, tokens: Tensor, batch_windows: int, progress: Progress) -> list[Tensor]:
    """Compute the exact ΔL of every KV group, ``[kv_groups]`` for each layer, in nats, float64 on the CPU.

    ΔL is the mean token loss with the group's gate closed, less the loss with all gates open. Each group takes one
    forward pass from its layer on; the hidden states that enter the layer are kept from one full forward pass.
    """
    changes = [torch.zeros(layer.kv_groups, dtype=torch.float64) for layer in decoder.layers]
    count = decoder.predicted(tokens)
    done, work = 0, len(range(0, len(tokens), batch_windows)) * sum(layer.kv_groups for layer in decoder.layers)
    for start in range(0, len(tokens), batch_windows):
        batch = tokens[start : start + batch_windows]
        captured = decoder.capture(batch)
        base = decoder.losses(decoder.resume(captured, 0, captured.inputs[0]), batch).double().sum()
        for index, layer in enumerate(decoder.layers):
            for group in range(layer.kv_groups):
                gate = torch.ones(1, layer.kv_groups, device=decoder.device)
                gate[0, group] = 0
                with gated(layer, kv_groups=gate):
                    losses = decoder.losses(decoder.resume(captured, index, captured.inputs[index]), batch)
                changes[index][group] += (losses.double().sum() - base).cpu() / count
                done += 1
                progress(done / work)
    return changes
