"""Score units by movement pruning (Sanh et al. 2020, section 4, equations 1 and 2).

The scores are taken along a short fine-tuning path.
"""

import torch
from torch import Tensor
from torch.nn import functional

from secateur.engine.scoring.base import Context, Scores, memoised
from secateur.engine.scoring.taylor import (
    Tensors,
    added,
    coupled,
    gradients_from_the_end,
    sums_by_unit,
    training_batches,
    unit_weights,
    wide,
    zero_scores,
)

STEPS = 16
LEARNING_RATE = 1e-2
"""Learning rate of the SGD steps, low enough to fine-tune without overshooting.

On a small trained model, the loss no longer falls at every step when the rate is thirty times as high.
"""


@memoised
def score(context: Context) -> Scores:
    """Return S(u) = −Σ_t Σ_{w in u} w_t·∂L/∂w_t over the steps t of plain SGD.

    The score is high where training moves weights away from zero. Each step takes one batch of calibration windows, in
    an order drawn with the context's seed. The model itself does not change: the displacements of its weights are kept
    beside the weights, in float32, and added to the outputs of the projections. Memory holds those displacements, as
    many as the projections have weights, and the gradients of one layer.

    Raises:
        PruningError: ``loss_not_finite`` when a gradient is NaN or infinite.
    """
    layers = context.decoder.layers
    weights = [unit_weights(layer) for layer in layers]
    moves: list[Tensors] = [
        {name: [torch.zeros_like(weight, dtype=wide(weight)) for weight in of] for name, of in tensors.items()}
        for tensors in weights
    ]
    scores = zero_scores(context.decoder)
    with added(context.decoder, moves, _displaced):
        for batch in training_batches(context, STEPS, torch.Generator().manual_seed(context.seed)):
            for index, gradients in gradients_from_the_end(context.decoder, [batch], moves):
                saliences: Tensors = {}
                for name, tensors in weights[index].items():
                    triples = list(zip(tensors, moves[index][name], gradients[name], strict=True))
                    saliences[name] = [(weight + move) * gradient for weight, move, gradient in triples]
                    for _, move, gradient in triples:
                        move -= LEARNING_RATE * gradient
                for structure, own in coupled(layers[index], sums_by_unit(layers[index], saliences)).items():
                    scores[structure][index] -= own
    return scores


def _displaced(moves: list[Tensor], entering: Tensor) -> Tensor:
    """Return what the displacements of a projection's weight, and of its bias if it has one, add to its output."""
    return functional.linear(entering, *(move.to(entering.dtype) for move in moves))
