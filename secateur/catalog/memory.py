"""A lower bound on the memory that pruning needs, computed from sizes alone.

The service refuses a request that cannot fit before a worker loads the model.

The estimate counts the weights, the hidden states that are kept, one layer's moments or gradients, and one batch's
activations and logits. It does not count the memory of libraries and of the interpreter. ``secateur/engine`` shows what
each stage keeps.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum

from secateur.catalog.architectures import ModelShape
from secateur.catalog.methods import Need
from secateur.catalog.resolve import Resolved, needs_reference
from secateur.catalog.spec import DTYPE_BYTES
from secateur.contract.errors import ErrorCode, PruningError

BATCH_TOKENS = 1024
"""The tokens of one forward or backward pass; a pass takes one window if the window is longer.

The number bounds the activations and the logits, which are the largest tensors.
"""
SHARD_BYTES = 5 * 10**9
"""Largest size of a file of weights. Weights that are joined or split when they are written are in memory for one file."""
WIDE = 4
"""Bytes of a number in float32, the dtype in which losses, moments and gradients are summed."""
ADAM = 4 * WIDE
"""Bytes per trained parameter beside the parameter itself: a master copy, its gradient and two moments."""
ATTENTION_TENSORS, CHANNEL_TENSORS = 8, 4
"""The numbers of tensors, as wide as the hidden states and as wide as the channels, in one layer's backward pass."""


class Place(StrEnum):
    """Where the weights of a model are while it is pruned."""

    MAPPED = "mapped"
    """In their files, from which the kernel reads the layer that is used, as on a CPU in the files' own dtype."""
    RESIDENT = "resident"
    """In the memory of the device."""
    STREAMED = "streamed"
    """In the host's memory or files, from which the layer that is used is copied to the device."""


@dataclass(frozen=True)
class Memory:
    """The memory that a run needs on one worker's device, in bytes.

    ``stages`` is the memory that each stage needs beside the weights.
    """

    weights: int
    stages: Mapping[str, int]

    @property
    def working(self) -> int:
        return max(self.stages.values())

    @property
    def total(self) -> int:
        return self.weights + self.working


def streams(resolved: Resolved) -> bool:
    """Return whether the layers of a run can be streamed: a training, weight gradients and dynamic pruning need all at once."""
    chosen = resolved.components
    return not chosen.dynamic and chosen.training is None and Need.GRADIENTS not in chosen.needs


def estimate(resolved: Resolved, shape: ModelShape, place: Place) -> Memory:
    """Estimate the memory that pruning a model of sizes ``shape`` needs, at the smallest ratio of the request.

    The ratio of a goal is not known before tokens leave (:attr:`Resolved.decided`); the largest that may follow counts.

    Of a mapped model, layers that are cut are held in files, too, one after the other. The experts of mixtures are joined
    when they are loaded, and a training holds the weights that it changes. A streamed model has its embeddings, its head
    and three layers on the device: the one that runs, the one that comes, and that of the reference; sets of hidden states
    that would crowd the device are kept on the host, see :mod:`secateur.engine.model.placement`.
    """
    mapped = place == Place.MAPPED
    spec, chosen, ratio = resolved.spec, resolved.components, min(resolved.ratios)
    needs = chosen.needs
    size = DTYPE_BYTES[resolved.dtype]
    tokens = spec.calibration.samples * spec.calibration.sequence_length
    batch = min(max(BATCH_TOKENS, spec.calibration.sequence_length), tokens)
    hidden, depth = shape.hidden_size, len(shape.layers)
    widest = max(max(layer.channels_per_expert, layer.attention_width) for layer in shape.layers)
    channels = max(layer.channels for layer in shape.layers)
    states = hidden * size
    logits = batch * shape.vocab_size * (size + WIDE)
    block = max(shape.layer_parameters(index) for index in range(depth))
    backward = batch * (ATTENTION_TENSORS * hidden + CHANNEL_TENSORS * channels) * size

    stages = {"evaluating": logits}
    if Need.MOMENTS in needs:
        moments = ((3 if Need.SOLVE in needs else 1) * widest**2 + widest * hidden) * WIDE
        kept = batch if place == Place.STREAMED else tokens
        stages["layer by layer"] = kept * states * (3 if chosen.fits_to_reference else 1) + moments
    if Need.GATES in needs:
        stages["gates"] = depth * batch * states + backward + logits
    if Need.GRADIENTS in needs:
        stages["gradients"] = depth * tokens * states + backward + logits + 2 * block * WIDE
    if chosen.training is not None:
        trained = shape.prunable_parameters * ADAM if chosen.training.all_weights else 0
        stages["training"] = depth * backward + logits + trained

    whole = shape.parameters * size
    weights = whole
    if mapped and chosen.training is not None:
        weights -= round(ratio * shape.prunable_parameters) * size
    elif mapped and not shape.family.experts:
        weights = block * size
    if place == Place.STREAMED:
        weights = whole - sum(shape.layer_parameters(index) for index in range(depth)) * size + 3 * block * size
    if mapped and (shape.family.fused or shape.family.experts):
        stages["exporting"] = min(whole, SHARD_BYTES)
    if chosen.dynamic:  # weights of the plain model, of the published model, and of the units that generate
        weights = (1 if mapped else 2) * whole + round((1 - ratio) * shape.prunable_parameters) * size
    trains_beside = chosen.training is not None and Need.REFERENCE in chosen.training.needs
    removals = [removed for splits in resolved.splits for removed in splits.values()]
    if trains_beside or any(needs_reference(chosen, removed) for removed in removals):
        weights += whole if place == Place.RESIDENT else 0
    return Memory(weights, stages)


def check_fits(resolved: Resolved, memory: Memory, capacity: int) -> None:
    """Check that ``capacity`` bytes can hold the estimate.

    Raises:
        PruningError: ``out_of_memory``; the message names settings that need less memory.
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
        f"{memory.working / 2**30:.1f} to work with); the largest live worker has {capacity / 2**30:.1f}. "
        f"Less takes: {', '.join(advice) or 'a smaller model'}. To wait for a larger worker, set 'requirements.memory_bytes'.",
        field="model_id",
    )
