"""How much each layer gives: the allocators, by the name a method gives them, and the way from a budget to a plan."""

from workers.engine.allocation import lsps, uniform
from workers.engine.allocation.base import Allocator
from workers.engine.allocation.budget import select_units

ALLOCATORS: dict[str, Allocator] = {
    "lsps": lsps.allocate,
    "uniform": uniform.allocate,
}

__all__ = ["ALLOCATORS", "Allocator", "select_units"]
