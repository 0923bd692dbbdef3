"""The structures by name: how the units of each are counted, shielded and cut in a model.

To add a structure, write a file with its class, and add a line here and an entry to ``secateur/catalog/structures.py``.
"""

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager

from torch import Tensor

from secateur.catalog.tables import by_name
from secateur.engine.model.decoder import Layer
from secateur.engine.structures.base import Structure, Width, expand
from secateur.engine.structures.channels import Channels
from secateur.engine.structures.experts import WholeExperts
from secateur.engine.structures.kv_groups import KVGroups
from secateur.engine.structures.layers import Layers
from secateur.engine.structures.sublayers import Attention, FeedForward

STRUCTURES: dict[str, Structure] = by_name(
    Layers(),
    Attention(),
    FeedForward(),
    WholeExperts(),
    KVGroups(),
    Channels(),
)
"""All structures of layers, in the order in which a plan is applied to a layer."""

WIDTHS: dict[str, Width] = {name: each for name, each in STRUCTURES.items() if isinstance(each, Width)}
"""The width structures; scorers and recoveries see their units through their projections."""


@contextmanager
def gated(layer: Layer, gates: Mapping[str, Tensor]) -> Iterator[None]:
    """Multiply the output of each unit by its gate while the context lasts; see :meth:`Width.gated`.

    ``gates`` are by width structure; the units of other structures are unchanged.
    """
    with ExitStack() as stack:
        for structure, gate in gates.items():
            stack.enter_context(WIDTHS[structure].gated(layer, gate))
        yield


__all__ = ["STRUCTURES", "WIDTHS", "Structure", "Width", "expand", "gated"]
