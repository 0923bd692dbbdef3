"""The pruning library. Needs no service: ``from workers.engine import prune``."""

from app.catalog.errors import PruningError
from app.catalog.spec import Allocation, Calibration, Evaluation, PruningSpec, Recovery, Scoring
from workers.engine.pipeline import PruningResult, prune
from workers.engine.targets import Paused

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
