"""The scorers, by the name a method gives them. Adding one is a file with a ``score`` and a line here."""

from workers.engine.scoring import flap, llm_pruner, loraprune, magnitude, moments, movement, piem, random, second_order
from workers.engine.scoring.base import Context, Scorer, Scores
from workers.engine.scoring.moments import PartContext, PartScorer

MODEL_SCORERS: dict[str, Scorer] = {
    "flap": flap.score,
    "llm-pruner": llm_pruner.score,
    "loraprune": loraprune.score,
    "magnitude": magnitude.score,
    "movement": movement.score,
    "piem": piem.score,
    "random": random.score,
}
"""They look at the whole model before anything is cut."""

PART_SCORERS: dict[str, PartScorer] = {
    "lorap": moments.lorap,
    "obs": second_order.score,
    "slimllm": moments.slimllm,
    "wanda": moments.wanda,
}
"""They look at a layer's part when the layers before it are cut."""

__all__ = ["MODEL_SCORERS", "PART_SCORERS", "Context", "PartContext", "PartScorer", "Scorer", "Scores"]
