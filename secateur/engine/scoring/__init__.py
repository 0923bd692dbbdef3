"""Scorers by the name that a method gives them.

To add a scorer, write a file with a function ``score`` and add a line here.
"""

from secateur.engine.scoring import (
    flap,
    llm_pruner,
    loraprune,
    magnitude,
    moments,
    movement,
    piem,
    random,
    second_order,
)
from secateur.engine.scoring.base import Context, Scorer, Scores
from secateur.engine.scoring.moments import LayerwiseScorer, UnitContext

MODEL_SCORERS: dict[str, Scorer] = {
    "flap": flap.score,
    "llm-pruner": llm_pruner.score,
    "loraprune": loraprune.score,
    "magnitude": magnitude.score,
    "movement": movement.score,
    "piem": piem.score,
    "random": random.score,
}
"""Scorers that score the whole model before any layer is cut."""

LAYERWISE_SCORERS: dict[str, LayerwiseScorer] = {
    "lorap": moments.lorap,
    "obs": second_order.score,
    "slimllm": moments.slimllm,
    "wanda": moments.wanda,
}
"""Scorers that score one structure of a layer after the layers before it are cut."""

__all__ = ["LAYERWISE_SCORERS", "MODEL_SCORERS", "Context", "LayerwiseScorer", "Scorer", "Scores", "UnitContext"]
