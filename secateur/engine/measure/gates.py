"""The effect on the loss of closing the gate of a unit.

The gradients of all gates are computed in one pass; exact shielding closes the gates one by one. Source: PIEM + LSPS
(Wang), section 3.2: ΔL(u) and ∂L/∂u, where u is the unit's gate m at m = 1.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from secateur.engine.model.decoder import Decoder, check_gradients
from secateur.engine.structures import WIDTHS, gated

Progress = Callable[[float], None]


@dataclass(frozen=True)
class GateStatistics:
    """Statistics of the gates of one structure in one layer, ``[units]``, float64 on the CPU.

    The loss L is the mean token loss in nats.
    """

    gradient: Tensor
    """∂L/∂m."""
    curvature: Tensor
    """The empirical Fisher estimate of ∂²L/∂m²."""

    @property
    def loss_change(self) -> Tensor:
        """Estimated change of the loss when a unit is removed, ``[units]``, in nats.

        It is ΔL(u) ≈ −g + ½·h, the second-order Taylor expansion of the loss from gate 1 to gate 0.
        """
        return -self.gradient + self.curvature / 2


LayerGates = dict[str, GateStatistics]
"""The gate statistics of one layer, by structure."""


def gate_statistics(decoder: Decoder, tokens: Tensor, batch_windows: int, progress: Progress) -> list[LayerGates]:
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
        {name: torch.zeros(2, structure.units(layer), dtype=torch.float64) for name, structure in WIDTHS.items()}
        for layer in decoder.layers
    ]
    for start in range(0, len(tokens), batch_windows):
        batch = tokens[start : start + batch_windows]
        for sums, gradients in zip(reversed(totals), _gradients_from_the_end(decoder, batch), strict=True):
            for structure, gradient in gradients.items():
                by_window = gradient.double().cpu()
                sums[structure] += torch.stack([by_window.sum(0), by_window.square().sum(0)])
        progress(min(start + batch_windows, len(tokens)) / len(tokens))
    check_gradients(total for sums in totals for total in sums.values())
    count = decoder.predicted(tokens)
    return [{name: GateStatistics(*(total / count)) for name, total in sums.items()} for sums in totals]


def _gradients_from_the_end(decoder: Decoder, batch: Tensor) -> Iterator[dict[str, Tensor]]:
    """Yield the gradients of each layer's gates, last layer first: ``[windows, units]`` by structure.

    The gradient of a window is that of the window's summed loss.
    """
    captured = decoder.capture(batch)
    upstream: Tensor | None = None
    for index in reversed(range(len(decoder.layers))):
        layer, hidden = decoder.layers[index], captured.inputs[index].detach().requires_grad_()
        gates = {
            name: torch.ones(len(batch), units, device=decoder.device, requires_grad=True)
            for name, structure in WIDTHS.items()
            if (units := structure.units(layer))
        }
        with torch.enable_grad(), gated(layer, gates):
            output = decoder.run_layer(captured, index, hidden)
            if upstream is None:
                output = decoder.losses(decoder.head(output), batch).sum()
            upstream, *gradients = torch.autograd.grad(output, [hidden, *gates.values()], upstream)
        yield dict(zip(gates, gradients, strict=True))


@torch.no_grad()
def shielded_loss_change(decoder: Decoder, tokens: Tensor, batch_windows: int, progress: Progress) -> list[Tensor]:
    """Compute the exact ΔL of every KV group, ``[kv_groups]`` for each layer, in nats, float64 on the CPU.

    ΔL is the mean token loss with the group's gate closed, less the loss with all gates open. Each group takes one
    forward pass from its layer on; the hidden states that enter the layer are kept from one full forward pass.
    """
    units = [WIDTHS["kv_groups"].units(layer) for layer in decoder.layers]
    changes = [torch.zeros(groups, dtype=torch.float64) for groups in units]
    count = decoder.predicted(tokens)
    done, work = 0, len(range(0, len(tokens), batch_windows)) * sum(units)
    for start in range(0, len(tokens), batch_windows):
        batch = tokens[start : start + batch_windows]
        captured = decoder.capture(batch)
        base = decoder.losses(decoder.resume(captured, 0, captured.inputs[0]), batch).double().sum()
        for index, layer in enumerate(decoder.layers):
            for group in range(units[index]):
                gate = torch.ones(1, units[index], device=decoder.device)
                gate[0, group] = 0
                with gated(layer, {"kv_groups": gate}):
                    losses = decoder.losses(decoder.resume(captured, index, captured.inputs[index]), batch)
                changes[index][group] += (losses.double().sum() - base).cpu() / count
                done += 1
                progress(done / work)
    return changes
