"""Score units by LLM-Pruner's first-order Taylor importance (Ma et al. 2023, equations 3 to 5)."""

from secateur.engine.scoring.base import Context, Scores, memoised
from secateur.engine.scoring.taylor import coupled, gradients_from_the_end, sums_by_unit, unit_weights, zero_scores


@memoised
def score(context: Context) -> Scores:
    """Return I(u) = Σ_{w in u} |w·∂L/∂w| over all weights and biases of a unit, where L is the mean token loss.

    This is equation 5 without its second-order term, computed element by element, and the importances of coupled
    structures are summed; the authors' code does the same by default. Memory holds the hidden states that enter every
    layer for all calibration tokens, and the gradients of one layer.

    Raises:
        PruningError: ``loss_not_finite`` when a gradient is NaN or infinite.
    """
    layers = context.decoder.layers
    weights = [unit_weights(layer) for layer in layers]
    scores = zero_scores(context.decoder)
    batches = context.tokens.split(context.batch_windows)
    for index, gradients in gradients_from_the_end(context.decoder, batches, weights):
        saliences = {
            name: [(weight * gradient).abs() for weight, gradient in zip(tensors, gradients[name], strict=True)]
            for name, tensors in weights[index].items()
        }
        for name, own in coupled(layers[index], sums_by_unit(layers[index], saliences)).items():
            scores[name][index] += own
        context.progress(1 - index / len(layers))
    return scores
