"""The scorers, by the name a method gives them. Adding one is a file with a ``score`` and a line here."""

from workers.engine.scoring import magnitude, piem, random
from workers.engine.scoring.base import Context, Scorer, Scores

SCORERS: dict[str, Scorer] = {
    "magnitude": magnitude.score,
    "piem": piem.score,
    "random": random.score,
}

__all__ = ["SCORERS", "Context", "Scorer", "Scores"]
