"""Gradients of the loss by tensors of each layer, one layer at a time, and their products' sums over units."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from secateur.engine.model.decoder import Decoder, Layer, check_gradients
from secateur.engine.scoring.base import Context, Scores, by_group

Tensors = dict[str, list[Tensor]]
"""Of one layer, by the name of a projection."""


def unit_weights(layer: Layer) -> Tensors:
    """Each projection's weight and, of input projections, bias: an output projection's bias belongs to no unit."""
    family = layer.family
    inputs = (*family.attention_inputs, *family.channel_inputs)
    return {
        name: [tensor for tensor in layer[name].parameters() if name in inputs or tensor.dim() == 2]
        for name in family.projections
    }


def wide(tensor: Tensor) -> torch.dtype:
    """What to add in: float32, or float64 where the tensor is that already."""
    return torch.promote_types(tensor.dtype, torch.float32)


def gradients_from_the_end(
    decoder: Decoder, batches: Sequence[Tensor], leaves: Sequence[Tensors]
) -> Iterator[tuple[int, Tensors]]:
    """Each layer's index and ∂L/∂leaf, L the mean token loss over all ``batches`` ``[windows, length]``, last layer first.

    Gradients are shaped like the leaves, in float32 or better. ``leaves`` are tensors that the layer computes with; the
    layer is done with them when it is yielded, and they may be changed in place then. The loss is summed over tokens until
    the end, which keeps gradients of order one: they survive float16.

    Each layer is run once more from the hidden states that entered it, for all batches, before the layer below: beside
    those hidden states of every layer and batch, memory holds one layer's gradients, and one batch's activations in it.

    Raises:
        PruningError: ``loss_not_finite`` when a gradient is NaN or infinite.
    """
    captured = [decoder.capture(batch) for batch in batches]
    upstream: list[Tensor | None] = [None] * len(batches)
    count = sum(decoder.predicted(batch) for batch in batches)
    for index in reversed(range(len(decoder.layers))):
        wanted = [leaf.requires_grad_() for tensors in leaves[index].values() for leaf in tensors]
        totals = [torch.zeros_like(leaf, dtype=wide(leaf), requires_grad=False) for leaf in wanted]
        for number, batch in enumerate(batches):
            hidden = captured[number].inputs.pop().detach().requires_grad_()
            with torch.enable_grad():
                output = decoder.run_layer(captured[number], index, hidden)
                if upstream[number] is None:
                    output = decoder.losses(decoder.head(output), batch).sum()
                upstream[number], *gradients = torch.autograd.grad(output, [hidden, *wanted], upstream[number])
            for total, gradient in zip(totals, gradients, strict=True):
                total += gradient
        for leaf, total in zip(wanted, totals, strict=True):
            leaf.requires_grad_(False)
            total /= count
        check_gradients(totals)
        left = iter(totals)
        yield index, {name: [next(left) for _ in tensors] for name, tensors in leaves[index].items()}


@contextmanager
def added(
    decoder: Decoder, tensors: Sequence[Tensors], term: Callable[[list[Tensor], Tensor], Tensor]
) -> Iterator[None]:
    """While the context lasts, projections return ``term`` of their tensors and of what enters them on top of their own."""
    hooks = [
        layer[name].register_forward_hook(lambda _, args, output, own=own: output + term(own, args[0]))
        for layer, named in zip(decoder.layers, tensors, strict=True)
        for name, own in named.items()
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def zero_scores(decoder: Decoder) -> Scores:
    """Scores to add to."""
    return Scores(
        [torch.zeros(layer.kv_groups, dtype=torch.float64) for layer in decoder.layers],
        [torch.zeros(layer.channels, dtype=torch.float64) for layer in decoder.layers],
    )


def training_batches(context: Context, steps: int, generator: torch.Generator) -> Iterator[Tensor]:
    """A batch of windows a step ``[windows, length]``; every pass over the calibration windows has an order of its own."""
    left: list[Tensor] = []
    for step in range(steps):
        if not left:
            order = torch.randperm(len(context.tokens), generator=generator)
            left = list(context.tokens[order.to(context.tokens.device)].split(context.batch_windows))
        yield left.pop()
        context.progress((step + 1) / steps)


def sums_by_unit(layer: Layer, saliences: Tensors) -> dict[str, Tensor]:
    """Saliences shaped like the weights (and biases), summed over each unit's rows or columns, projection by projection.

    Float64 on the CPU, ``[kv_groups]`` for attention's projections and ``[channels]`` for the others.
    """
    family = layer.family
    sums = {}
    for name, (weight, *bias) in saliences.items():
        outputs = (family.attention_output, family.channel_output)
        units = weight.sum(0 if name in outputs else 1, dtype=torch.float64)
        for rows in bias:
            units = units + rows
        attention = name in (*family.attention_inputs, family.attention_output)
        sums[name] = (by_group(units, layer.kv_groups) if attention else units).cpu()
    return sums


def coupled(layer: Layer, sums: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """The projections' sums by unit added up over those that are cut together: ``[kv_groups]`` and ``[channels]``."""
    family = layer.family
    attention, channel = (
        torch.stack([sums[name] for name in (*inputs, output)]).sum(0)
        for inputs, output in (
            (family.attention_inputs, family.attention_output),
            (family.channel_inputs, family.channel_output),
        )
    )
    return attention, channel
