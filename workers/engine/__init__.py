"""The pruning library. Needs no service: ``from workers.engine import prune``."""

from app.catalog.errors import PruningError
from app.catalog.spec import Allocation, Calibration, Evaluation, PruningSpec, Recovery, Scoring
from workers.engine.pipeline import Paused, PruningResult, prune

__all__ = [
    "Allocation",
    "Calibration",
    "Evaluation",
    "Paused",
    "PruningError",
    "PruningResult",
    "PruningSpec",
    "Recovery",
    "Scoring",
    "prune",
]
