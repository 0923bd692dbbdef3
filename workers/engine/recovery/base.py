"""What a layer-wise recovery is given and what it returns: one function shape for all."""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from app.catalog.spec import Recovery
from workers.engine.sweep import Moments


@dataclass(frozen=True)
class Cut:
    """A part about to be cut: its output projection's weight ``[out, in]``, bias ``[out]`` or none, the moments of its
    inputs, and which inputs stay, ``[kept]``. Float32."""

    weight: Tensor
    bias: Tensor | None
    moments: Moments
    kept: Tensor


Mend = Callable[[Cut, Recovery], tuple[Tensor, Tensor | None]]
"""The output projection's new weight ``[out, kept]`` and bias. Whether there is one is the same for every layer."""
