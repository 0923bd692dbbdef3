"""What the catalogue names is what the engine has, and no mix of components is let in that cannot work."""

from itertools import product
from typing import Any

import pytest
from pydantic import ValidationError

from secateur.catalog.methods import (
    ALLOCATORS,
    DAMPING,
    LAYERWISE_RECOVERIES,
    METHODS,
    NO_RECOVERY,
    SCORERS,
    TRAININGS,
    Need,
)
from secateur.catalog.resolve import components
from secateur.catalog.spec import PruningSpec
from secateur.catalog.structures import DEPTH
from secateur.engine import allocation, recovery, scoring
from secateur.engine.run.whole import EQUAL_SCORERS


def test_every_name_has_its_function() -> None:
    of_depth = {name for name, scorer in SCORERS.items() if scorer.structures == DEPTH}
    widths = scoring.MODEL_SCORERS.keys() | scoring.LAYERWISE_SCORERS.keys()
    of_equal_numbers = {name for scorers in EQUAL_SCORERS.values() for name in scorers}
    assert SCORERS.keys() == widths | of_equal_numbers | of_depth
    assert {name for name, scorer in SCORERS.items() if scorer.layerwise} == scoring.LAYERWISE_SCORERS.keys()
    assert ALLOCATORS.keys() == allocation.ALLOCATORS.keys()
    assert LAYERWISE_RECOVERIES.keys() == recovery.LAYERWISE_RECOVERIES.keys() | {NO_RECOVERY}
    for method in METHODS.values():
        assert method.scorer in SCORERS and method.allocator in ALLOCATORS
        assert method.layerwise_recovery in LAYERWISE_RECOVERIES


def chosen(**changes: Any) -> Any:
    return components(PruningSpec.model_validate({"target_ratio": 0.2, "method": "piem-lsps", **changes}))


def test_steps_are_those_of_every_target_and_its_training() -> None:
    several = {"target_ratio": [0.2, 0.3, 0.5]}
    assert chosen(**several).steps == 3 * 4, "the method's default"
    assert chosen(**several, rounds=2, recovery={"training": {"kind": "lora"}}).steps == 3 * (2 + 1)
    assert chosen(recovery={"layerwise": {"kind": "bias"}}).steps == 4


def test_training_goes_on_top_of_the_methods_own_recovery() -> None:
    both = chosen(method="slimllm", recovery={"training": {"kind": "lora"}})
    assert (both.layerwise.name, both.training.name) == ("linear-regression", "lora")
    assert set(TRAININGS) == {"lora", "distill"}


def test_needs_are_those_of_all_components() -> None:
    assert chosen(method="magnitude").needs == set()
    assert chosen(method="secateur").needs == {Need.FORWARD, Need.MOMENTS, Need.SOLVE, Need.REFERENCE}
    trained = chosen(method="magnitude", recovery={"training": {"kind": "distill"}})
    assert trained.needs == {Need.BACKWARD, Need.REFERENCE}
    assert {name for name, method in METHODS.items() if method.needs_gradients} == {
        "secateur-gradient", "piem-lsps", "piem", "lsps", "llm-pruner", "loraprune", "movement", "dsgp"
    }  # fmt: skip


def test_a_refit_is_the_methods_own_where_nothing_else_is_requested() -> None:
    def refit(method: str, **layerwise: Any) -> tuple[str, float, bool]:
        found = chosen(method=method, recovery={"layerwise": layerwise})
        return found.fit_to, found.damping, found.fits_to_reference

    assert refit("secateur") == ("model", DAMPING, True)
    assert refit("secateur-gradient") == ("layer", 10.0, False)
    assert refit("sparsegpt") == ("layer", 0.01, False)
    assert refit("sparsegpt", fit_to="model", damping=0.5) == ("model", 0.5, True)
    assert refit("wanda", kind="least-squares", fit_to="layer") == ("layer", DAMPING, False)
    assert not refit("wanda")[2], "no refit, no reference"


@pytest.mark.parametrize(("scorer", "allocator"), product(SCORERS, ALLOCATORS))
def test_every_mix_is_let_in_but_ranking_what_has_no_scores_yet(scorer: str, allocator: str) -> None:
    parts = {"scoring": {"kind": scorer}, "allocation": {"kind": allocator}}
    if SCORERS[scorer].layerwise and allocator == "threshold":
        with pytest.raises(ValidationError, match="allowed: cosine, inner, lsps, uniform") as caught:
            PruningSpec.model_validate({"target_ratio": 0.2, "method": "random", **parts})
        assert [error["loc"] for error in caught.value.errors()] == [("allocation",)]
    else:
        PruningSpec.model_validate({"target_ratio": 0.2, "method": "random", **parts})
