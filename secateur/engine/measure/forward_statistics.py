"""Forward statistics: how each layer changes hidden states, and how the outputs of its units vary.

One forward pass over the calibration tokens computes them.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from secateur.engine.model.decoder import STRUCTURES, Decoder, Structure


@dataclass(frozen=True)
class ForwardStatistics:
    """Forward statistics by layer, in float64 on the CPU."""

    cosines: list[float]
    """Mean over tokens of the cosine between the input and the output of each layer."""
    variances: dict[Structure, list[Tensor]]
    """Variance over tokens of the inputs of the output projections, ``[in]`` for each layer."""

    @classmethod
    def of(cls, tensors: list[Tensor]) -> "ForwardStatistics":
        """Build the statistics from the tensors that :func:`forward_statistics` returns."""
        cosines, *variances = tensors
        layers = len(cosines)
        return cls(cosines.tolist(), {"kv_groups": variances[:layers], "channels": variances[layers:]})


@torch.no_grad()
def forward_statistics(
    decoder: Decoder, tokens: Tensor, batch_windows: int, progress: Callable[[float], None]
) -> list[Tensor]:
    """Compute the forward statistics of ``tokens`` ``[windows, length]`` in one forward pass.

    :meth:`ForwardStatistics.of` reads the returned tensors.
    """
    cosines = [0.0] * len(decoder.layers)
    sums: dict[Structure, list[Tensor]] = {
        structure: [torch.zeros(2, 1, dtype=torch.float64)] * len(cosines) for structure in STRUCTURES
    }

    def turned(index: int, args: tuple[Tensor, ...], output: Tensor | tuple[Tensor, ...]) -> None:
        leaving = output[0] if isinstance(output, tuple) else output
        similarity = nn.functional.cosine_similarity(args[0].float(), leaving.float(), dim=-1)
        cosines[index] += float(similarity.double().sum())

    def seen(index: int, structure: Structure, inputs: Tensor) -> None:
        flat = inputs.flatten(0, -2).double()
        sums[structure][index] = sums[structure][index] + torch.stack([flat.sum(0), flat.square().sum(0)]).cpu()

    hooks = []
    for number, layer in enumerate(decoder.layers):
        hooks.append(
            layer.module.register_forward_hook(lambda _, args, output, number=number: turned(number, args, output))
        )
        for structure in STRUCTURES:
            hooks.append(
                layer.output(structure).register_forward_pre_hook(
                    lambda _, args, number=number, structure=structure: seen(number, structure, args[0])
                )
            )
    try:
        for start in range(0, len(tokens), batch_windows):
            decoder.model(tokens[start : start + batch_windows], use_cache=False, logits_to_keep=1)
            progress(min(start + batch_windows, len(tokens)) / len(tokens))
    finally:
        for hook in hooks:
            hook.remove()
    count = tokens.numel()
    variances = [
        (squares / count - (total / count).square()).clamp_min(0)
        for structure in STRUCTURES
        for total, squares in sums[structure]
    ]
    return [torch.tensor(cosines, dtype=torch.float64) / count, *variances]
