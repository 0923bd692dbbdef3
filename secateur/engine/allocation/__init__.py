"""Allocators, by the name that a method gives them, which decide how much is removed from each layer.

The package also converts the share of each layer into whole units.
"""

from secateur.engine.allocation import cosine, lsps, threshold, uniform
from secateur.engine.allocation.base import Allocator, LayerLimit, Share
from secateur.engine.allocation.budget import Layers, UnitCounts, best, equal_units, whole_units

ALLOCATORS: dict[str, Allocator] = {
    "cosine": cosine.allocate,
    "inner": uniform.allocate_inner,
    "lsps": lsps.allocate,
    "threshold": threshold.allocate,
    "uniform": uniform.allocate,
}

__all__ = [
    "ALLOCATORS",
    "Allocator",
    "LayerLimit",
    "Layers",
    "Share",
    "UnitCounts",
    "best",
    "equal_units",
    "whole_units",
]
