"""Forward statistics: how each layer changes hidden states, and how the outputs of its units vary.

One forward pass over the calibration tokens computes them.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from secateur.engine.model.decoder import Decoder
from secateur.engine.structures import WIDTHS


@dataclass(frozen=True)
class ForwardStatistics:
    """Forward statistics by layer, in float64 on the CPU."""

    cosines: list[float]
    """Mean over tokens of the cosine between the input and the output of each layer."""
    variances: dict[str, list[Tensor]]
    """Variance over tokens of the inputs of each structure's output projection, ``[in]`` for each layer."""

    @classmethod
    def of(cls, tensors: list[Tensor]) -> "ForwardStatistics":
        """Build the statistics from the tensors that :func:`forward_statistics` returns."""
        cosines, *variances = tensors
        layers, left = len(cosines), iter(variances)
        return cls(cosines.tolist(), {structure: [next(left) for _ in range(layers)] for structure in WIDTHS})


@torch.no_grad()
def forward_statistics(
    decoder: Decoder, tokens: Tensor, batch_windows: int, progress: Callable[[float], None]
) -> list[Tensor]:
    """Compute the forward statistics of ``tokens`` ``[windows, length]`` in one forward pass.

    :meth:`ForwardStatistics.of` reads the returned tensors.
    """
    cosines = [0.0] * len(decoder.layers)
    sums = {structure: [torch.zeros(2, 1, dtype=torch.float64)] * len(cosines) for structure in WIDTHS}

    def turned(index: int, args: tuple[Tensor, ...], output: Tensor | tuple[Tensor, ...]) -> None:
        leaving = output[0] if isinstance(output, tuple) else output
        similarity = nn.functional.cosine_similarity(args[0].float(), leaving.float(), dim=-1)
        cosines[index] += float(similarity.double().sum())

    def seen(index: int, structure: str, inputs: Tensor) -> None:
        flat = inputs.flatten(0, -2).double()
        sums[structure][index] = sums[structure][index] + torch.stack([flat.sum(0), flat.square().sum(0)]).cpu()

    batches, hidden = decoder.enter_batches(tokens, batch_windows)
    for number, layer in enumerate(decoder.layers):
        hooks = [
            layer.module.register_forward_hook(lambda _, args, output, number=number: turned(number, args, output))
        ]
        for name, structure in WIDTHS.items():
            if structure.units(layer):
                hooks.append(
                    structure.output(layer).register_forward_pre_hook(
                        lambda _, args, number=number, name=name: seen(number, name, args[0])
                    )
                )
        try:
            decoder.run_batches(batches, number, hidden)
        finally:
            for hook in hooks:
                hook.remove()
        progress((number + 1) / len(decoder.layers))
    count = tokens.numel()
    variances = [
        (squares / count - (total / count).square()).clamp_min(0)
        for structure in WIDTHS
        for total, squares in sums[structure]
    ]
    return [torch.tensor(cosines, dtype=torch.float64) / count, *variances]
