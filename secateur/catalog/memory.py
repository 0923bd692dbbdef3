"""How much memory a pruning takes at least, from sizes alone: what cannot fit is refused before a worker loads it.

Counted are weights, hidden states that are kept, one layer's moments or gradients, one batch's activations and logits; not
what libraries and the interpreter take. See workers/engine for what each stage keeps.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from secateur.catalog.architectures import ModelShape
from secateur.catalog.methods import Need
from secateur.catalog.resolve import Resolved
from secateur.catalog.spec import DTYPE_BYTES
from secateur.contract.errors import ErrorCode, PruningError

BATCH_TOKENS = 1024
"""Of one forward or backward pass; one window, where that is longer. Bounds activations, and the logits that are the largest."""
WIDE = 4
"""Bytes of a number in float32, in which losses, moments and gradients are summed."""
ADAM = 4 * WIDE
"""Bytes a parameter that is trained takes beside itself: a master, its gradient and two moments."""
ATTENTION_TENSORS, CHANNEL_TENSORS = 8, 4
"""Tensors as wide as the hidden states, and as the channels, that one layer's backward pass needs."""


@dataclass(frozen=True)
class Memory:
    """In bytes, on one worker's device; ``stages`` is what each takes beside the weights."""

    weights: int
    stages: Mapping[str, int]

    @property
    def working(self) -> int:
        return max(self.stages.values())

    @property
    def total(self) -> int:
        return self.weights + self.working


def estimate(resolved: Resolved, shape: ModelShape, mapped: bool) -> Memory:
    """What pruning a model of ``shape`` takes, at the smallest ratio of the request.

    ``mapped``: weights stay in their files until they are cut, as on a CPU in the files' own dtype.
    """
    spec, chosen, ratio = resolved.spec, resolved.components, min(resolved.ratios)
    needs = chosen.needs
    size, layer = DTYPE_BYTES[resolved.dtype], shape.layers[0]
    tokens = spec.calibration.samples * spec.calibration.sequence_length
    batch = min(max(BATCH_TOKENS, spec.calibration.sequence_length), tokens)
    hidden, depth = shape.hidden_size, len(shape.layers)
    widest = max(layer.channels_per_expert, layer.attention_width)
    states = hidden * size
    logits = batch * shape.vocab_size * (size + WIDE)
    block = max(shape.layer_parameters(each) for each in shape.layers)
    backward = batch * (ATTENTION_TENSORS * hidden + CHANNEL_TENSORS * layer.channels) * size

    stages = {"evaluating": logits}
    if Need.MOMENTS in needs:
        moments = ((3 if Need.SOLVE in needs else 1) * widest**2 + widest * hidden) * WIDE
        stages["layer by layer"] = tokens * states * (3 if chosen.fits_to_reference else 1) + moments
    if Need.GATES in needs:
        stages["gates"] = depth * batch * states + backward + logits
    if Need.GRADIENTS in needs:
        stages["gradients"] = depth * tokens * states + backward + logits + 2 * block * WIDE
    if chosen.training is not None:
        trained = shape.prunable_parameters * ADAM if chosen.training.all_weights else 0
        stages["training"] = depth * backward + logits + trained

    whole = shape.parameters * size
    weights = whole - round(ratio * shape.prunable_parameters) * size if mapped else whole
    if chosen.dynamic:  # the plain model, the published one, and the units that generate
        weights = (1 if mapped else 2) * whole + round((1 - ratio) * shape.prunable_parameters) * size
    trains_beside = chosen.training is not None and Need.REFERENCE in chosen.training.needs
    if (chosen.fits_to_reference and chosen.rounds > 1) or trains_beside:
        weights += 0 if mapped else whole
    return Memory(weights, stages)


def check_fits(resolved: Resolved, memory: Memory, capacity: int) -> None:
    """Check that ``capacity`` bytes can hold the estimate.

    Raises:
        PruningError: ``out_of_memory``, naming what takes less.
    """
    if memory.total <= capacity:
        return
    advice = []
    if DTYPE_BYTES[resolved.dtype] > 2:
        advice.append("dtype 'bfloat16'")
    if memory.working > capacity / 4:
        advice.append("fewer or shorter calibration samples")
    if not resolved.components.scorer.layerwise or resolved.components.training is not None:
        advice.append("method 'wanda' or 'secateur' with one round, and no training")
    raise PruningError(
        ErrorCode.OUT_OF_MEMORY,
        f"This takes at least {memory.total / 2**30:.1f} GiB ({memory.weights / 2**30:.1f} of weights, "
        f"{memory.working / 2**30:.1f} to work with); the largest worker has {capacity / 2**30:.1f}. "
        f"Less takes: {', '.join([*advice, 'a larger worker'])}.",
        field="model_id",
    )
