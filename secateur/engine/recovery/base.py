"""What a layer-wise recovery is given and what it returns: one function shape for all."""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from secateur.engine.measure.layer_stream import Moments


@dataclass(frozen=True)
class Cut:
    """A structure about to be cut, or one expert's share of it: its output projection's weight ``[out, in]``, bias ``[out]`` or
    none, the moments of its inputs, and which inputs stay, ``[kept]``; float32. ``damping``: how hard a refit is pulled
    towards the weights as they are."""

    weight: Tensor
    bias: Tensor | None
    moments: Moments
    kept: Tensor
    damping: float


LayerwiseRecovery = Callable[[Cut], tuple[Tensor, Tensor | None]]
"""The output projection's new weight ``[out, kept]`` and bias. Whether there is one is the same for every layer."""
