"""What the loss does when a unit's gate closes: gradients of every gate in one pass, exact shielding one by one.

PIEM + LSPS (Wang), section 3.2: ΔL(u) and ∂L/∂u, with u taken as the unit's gate m at m = 1.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from secateur.engine.model.decoder import Decoder, check_gradients, gated

Progress = Callable[[float], None]


@dataclass(frozen=True)
class GateStatistics:
    """Of one layer's gates, in nats of the mean token loss, float64 on the CPU: ``[kv_groups]`` and ``[channels]``.

    ``gradient`` is ∂L/∂m, ``curvature`` the empirical Fisher estimate of ∂²L/∂m².
    """

    kv_group_gradient: Tensor
    kv_group_curvature: Tensor
    channel_gradient: Tensor
    channel_curvature: Tensor

    @property
    def kv_group_loss_change(self) -> Tensor:
        return estimated_loss_change(self.kv_group_gradient, self.kv_group_curvature)

    @property
    def channel_loss_change(self) -> Tensor:
        return estimated_loss_change(self.channel_gradient, self.channel_curvature)


def estimated_loss_change(gradient: Tensor, curvature: Tensor) -> Tensor:
    """ΔL(u) ≈ −g + ½·h: the loss's second-order Taylor expansion from gate 1 to gate 0."""
    return -gradient + curvature / 2


def gate_statistics(decoder: Decoder, tokens: Tensor, batch_windows: int, progress: Progress) -> list[GateStatistics]:
    """Gradient and curvature of every gate over ``tokens`` ``[windows, length]``: two forwards and one backward.

    Each window has gates of its own, so one backward gives per-window gradients. The loss is summed over tokens, which
    keeps gradients of order one: they survive float16. Curvature is E over tokens of g², each window's summed gradient
    standing for its tokens' independent ones.

    The backward goes layer by layer, each run once more from the hidden states that entered it: peak memory is one
    layer's activations, not all layers'.

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
    """Per window, the summed loss's gradient by the gates of each layer, last layer first: ``[windows, units]``."""
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
    """ΔL of every KV group exactly: the mean token loss with its gate closed, less the loss with all gates open.

    One forward a group, from its layer on: what entered the layer is kept from one full forward. Returns ``[kv_groups]``
    a layer, float64 on the CPU, in nats.
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
