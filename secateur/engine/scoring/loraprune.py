"""Score units by LoRAPrune's importance (Zhang et al. 2023, equations 6 to 10).

The importance estimates the gradients of weights from the gradients of LoRA factors.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional

from secateur.engine.scoring.base import Context, Scores, memoised
from secateur.engine.scoring.taylor import (
    added,
    coupled,
    gradients_from_the_end,
    sums_by_unit,
    training_batches,
    wide,
    zero_scores,
)

RANK = 8
SCALING = 16 / RANK
STEPS = 10
"""Number of optimizer steps; the authors take as many between two cuts."""
LEARNING_RATE = 1e-4
MAX_GRADIENT_NORM = 1.0
DECAY = 0.9
"""Decay of the moving average of the scores.

``RANK``, ``SCALING``, ``LEARNING_RATE``, ``MAX_GRADIENT_NORM`` and ``DECAY`` are the authors' settings.
"""


@memoised
def score(context: Context) -> Scores:
    """Return S ← 0.9·S + 0.1·s over steps of AdamW that train adapters B·A beside every projection.

    The model itself is frozen. For each projection, s sums |G∘(W + 2·B·A)| over a unit's rows or columns and divides
    the sums by their L2 norm over the units; s then adds up the projections whose units are cut together. G = ∂L/∂B·A +
    B·∂L/∂A − ∂L/∂B·∂L/∂A estimates ∂L/∂W without computing it; the gradients in G are the clipped ones with which the
    optimizer makes its step. Every round begins with new adapters: A is drawn as `peft` draws it, with the context's
    seed, and B is zero.

    Raises:
        PruningError: ``loss_not_finite`` when a gradient is NaN or infinite.
    """
    layers = context.decoder.layers
    generator = torch.Generator().manual_seed(context.seed)
    factors = [{name: _adapter(layer[name], generator) for name in layer.projections} for layer in layers]
    every = [factor for named in factors for pair in named.values() for factor in pair]
    optimizer = torch.optim.AdamW(every, lr=LEARNING_RATE, weight_decay=0.0)
    scores = zero_scores(context.decoder)
    with added(context.decoder, factors, _adapted):
        for batch in training_batches(context, STEPS, generator):
            for index, gradients in gradients_from_the_end(context.decoder, [batch], factors):
                for name, pair in factors[index].items():
                    for factor, gradient in zip(pair, gradients[name], strict=True):
                        factor.grad = gradient
            nn.utils.clip_grad_norm_(every, MAX_GRADIENT_NORM)
            for index, layer in enumerate(layers):
                sums = sums_by_unit(layer, {name: [_salience(layer[name], *of)] for name, of in factors[index].items()})
                for structure, own in coupled(
                    layer, {name: of / (of.norm() + 1e-8) for name, of in sums.items()}
                ).items():
                    scores[structure][index].mul_(DECAY).add_(own, alpha=1 - DECAY)
            optimizer.step()
    return scores


def _adapter(linear: nn.Linear, generator: torch.Generator) -> list[Tensor]:
    """Return a new adapter for ``linear``.

    A is ``[rank, in_features]``, uniform up to 1/√in_features, and B is ``[out_features, rank]``, zero.
    """
    weight = linear.weight
    drawn = torch.rand(RANK, linear.in_features, generator=generator, dtype=wide(weight))
    down = ((2 * drawn - 1) / linear.in_features**0.5).to(weight.device)
    return [down, torch.zeros(linear.out_features, RANK, dtype=wide(weight), device=weight.device)]


def _adapted(factors: list[Tensor], entering: Tensor) -> Tensor:
    """Return what an adapter adds to the output of its projection."""
    down, up = (factor.to(entering.dtype) for factor in factors)
    return SCALING * functional.linear(functional.linear(entering, down), up)


def _salience(linear: nn.Linear, down: Tensor, up: Tensor) -> Tensor:
    """Return |G∘(W + 2·B·A)| in the shape of the projection's weight."""
    assert down.grad is not None and up.grad is not None
    gradient = up.grad @ down + up @ down.grad - up.grad @ down.grad
    return (gradient * (linear.weight + SCALING * up @ down)).abs()
