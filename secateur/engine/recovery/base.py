"""Define what a layer-wise recovery receives and returns: all layer-wise recoveries have one function shape."""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from secateur.engine.measure.layer_stream import Moments


@dataclass(frozen=True)
class Cut:
    """A structure that is about to be cut, or one expert's share of the structure.

    ``weight`` ``[out, in]`` and ``bias`` ``[out]`` (or ``None``) belong to the output projection, ``moments`` are those
    of its inputs, and ``kept`` ``[kept]`` names the inputs that stay. Values are float32. ``damping`` sets how strongly
    a refit is pulled towards the present weights.
    """

    weight: Tensor
    bias: Tensor | None
    moments: Moments
    kept: Tensor
    damping: float


LayerwiseRecovery = Callable[[Cut], tuple[Tensor, Tensor | None]]
"""Function that returns the new weight ``[out, kept]`` and the new bias of an output projection.

Either every layer gets a bias or none does.
"""
