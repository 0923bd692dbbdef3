"""The pruning library. Needs no service: ``from secateur.engine import prune``."""

from secateur.catalog.spec import Allocation, Calibration, Evaluation, PruningSpec, Recovery, Scoring
from secateur.contract.errors import PruningError
from secateur.engine.run.pipeline import PruningResult, prune
from secateur.engine.run.targets import Paused

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
