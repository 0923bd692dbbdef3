"""Score units at random, as the baseline that every other score must beat."""

import torch

from secateur.engine.scoring.base import Context, Scores
from secateur.engine.structures import WIDTHS


def score(context: Context) -> Scores:
    """Return independent uniform scores, which the seed and the widths of the model determine."""
    generator = torch.Generator().manual_seed(context.seed)

    def draw(count: int) -> torch.Tensor:
        return torch.rand(count, generator=generator, dtype=torch.float64)

    layers = context.decoder.layers
    return {name: [draw(structure.units(layer)) for layer in layers] for name, structure in WIDTHS.items()}
