"""Units drawn at random: what any other score must beat."""

import torch

from secateur.engine.scoring.base import Context, Scores


def score(context: Context) -> Scores:
    """Independent uniform scores, fixed by the seed and the widths of the model."""
    generator = torch.Generator().manual_seed(context.seed)

    def draw(count: int) -> torch.Tensor:
        return torch.rand(count, generator=generator, dtype=torch.float64)

    layers = context.decoder.layers
    return Scores([draw(layer.kv_groups) for layer in layers], [draw(layer.channels) for layer in layers])
