"""Compute gradients of the loss by each layer's tensors, one layer at a time, and sum products over units."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from secateur.engine.model.decoder import Decoder, Layer, check_gradients
from secateur.engine.scoring.base import Context, Scores, by_unit
from secateur.engine.structures import WIDTHS

Tensors = dict[str, list[Tensor]]
"""Tensors of one layer, by the name of the projection."""


def unit_weights(layer: Layer) -> Tensors:
    """Return each projection's weight and, for input projections, its bias.

    The bias of an output projection belongs to no unit.
    """
    outputs = {structure.output_name(layer.family) for structure in WIDTHS.values()}
    return {
        name: [tensor for tensor in layer[name].parameters() if name not in outputs or tensor.dim() == 2]
        for name in layer.projections
    }


def wide(tensor: Tensor) -> torch.dtype:
    """Return the dtype in which sums are computed: float32, or float64 where ``tensor`` is float64."""
    return torch.promote_types(tensor.dtype, torch.float32)


def gradients_from_the_end(
    decoder: Decoder, batches: Sequence[Tensor], leaves: Sequence[Tensors]
) -> Iterator[tuple[int, Tensors]]:
    """Yield each layer's index and ∂L/∂leaf, the last layer first.

    L is the mean token loss over all ``batches`` ``[windows, length]``. Gradients have the shapes of the leaves, in
    float32 or better. ``leaves`` are tensors with which the layer computes; when a layer is yielded, its leaves are no
    longer used and may be changed in place. The loss is summed over tokens and divided by their number at the end,
    which keeps gradients of order one, so that they survive float16.

    Each layer runs once more, for all batches, from the hidden states that entered it, before the layer below it does.
    Memory holds the hidden states of every layer and batch, the gradients of one layer, and the activations of one
    batch in that layer.

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
    """Add ``term`` to the output of every projection while the context lasts.

    ``term`` is called with the projection's own ``tensors`` and with the input of the projection.
    """
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
    """Return scores of zero, to which a scorer adds."""
    return {
        name: [torch.zeros(structure.units(layer), dtype=torch.float64) for layer in decoder.layers]
        for name, structure in WIDTHS.items()
    }


def training_batches(context: Context, steps: int, generator: torch.Generator) -> Iterator[Tensor]:
    """Yield a batch of windows ``[windows, length]`` for each step.

    Every pass over the calibration windows has its own order.
    """
    left: list[Tensor] = []
    for step in range(steps):
        if not left:
            order = torch.randperm(len(context.tokens), generator=generator)
            left = list(context.tokens[order.to(context.tokens.device)].split(context.batch_windows))
        yield left.pop()
        context.progress((step + 1) / steps)


def sums_by_unit(layer: Layer, saliences: Tensors) -> dict[str, Tensor]:
    """Sum saliences over each unit's rows or columns, projection by projection.

    The saliences have the shapes of the weights (and biases). The sums are float64 on the CPU, ``[units]`` of the
    projection's structure.
    """
    sums = {}
    for structure in WIDTHS.values():
        output = structure.output_name(layer.family)
        for name in {*structure.input_names(layer.family), output} & saliences.keys():
            weight, *bias = saliences[name]
            rows = weight.sum(0 if name == output else 1, dtype=torch.float64)
            for each in bias:
                rows = rows + each
            sums[name] = by_unit(rows, structure.units(layer)).cpu()
    return sums


def coupled(layer: Layer, sums: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Add up the sums by unit of the projections that are cut together: ``[units]`` by structure."""
    return {
        name: torch.stack(
            [sums[each] for each in (*structure.input_names(layer.family), structure.output_name(layer.family))]
        ).sum(0)
        for name, structure in WIDTHS.items()
        if structure.units(layer)
    }
