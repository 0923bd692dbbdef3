"""How much each layer gives: the allocators, by the name a method gives them, and the way from a share to whole units."""

from secateur.engine.allocation import cosine, lsps, threshold, uniform
from secateur.engine.allocation.base import Allocator, LayerLimit, Share
from secateur.engine.allocation.budget import UnitCounts, best, equal_units, whole_units

ALLOCATORS: dict[str, Allocator] = {
    "cosine": cosine.allocate,
    "inner": uniform.allocate_inner,
    "lsps": lsps.allocate,
    "threshold": threshold.allocate,
    "uniform": uniform.allocate,
}

__all__ = ["ALLOCATORS", "Allocator", "LayerLimit", "Share", "UnitCounts", "best", "equal_units", "whole_units"]
