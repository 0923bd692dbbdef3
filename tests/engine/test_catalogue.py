"""What the catalogue names is what the engine has, and no mix of parts is let in that cannot work."""

from itertools import product
from typing import Any, get_args

import pytest
from pydantic import ValidationError

from secateur.catalog.methods import (
    DAMPING,
    GRADIENT_ALLOCATORS,
    GRADIENT_SCORERS,
    LAYERWISE_SCORERS,
    RANKING_ALLOCATORS,
    TRAINED,
    Allocator,
    RecoveryKind,
    Scorer,
)
from secateur.catalog.spec import PruningSpec
from secateur.engine.allocation import ALLOCATORS
from secateur.engine.recovery import LAYERWISE_RECOVERIES
from secateur.engine.scoring import LAYERWISE_SCORERS as BY_LAYER
from secateur.engine.scoring import MODEL_SCORERS


def test_every_name_has_its_function() -> None:
    assert set(get_args(Scorer)) == MODEL_SCORERS.keys() | BY_LAYER.keys()
    assert set(get_args(Allocator)) == ALLOCATORS.keys()
    assert set(get_args(RecoveryKind)) == {"none", *LAYERWISE_RECOVERIES, *TRAINED}
    assert BY_LAYER.keys() == LAYERWISE_SCORERS and not MODEL_SCORERS.keys() & LAYERWISE_SCORERS
    assert MODEL_SCORERS.keys() > GRADIENT_SCORERS and ALLOCATORS.keys() > GRADIENT_ALLOCATORS | RANKING_ALLOCATORS


def test_rounds_in_all_are_those_of_every_target_and_its_training() -> None:
    plain = {"target_ratio": [0.2, 0.3, 0.5], "method": "piem-lsps"}
    assert PruningSpec.model_validate(plain).total_rounds == 3 * 4, "the method's default"
    assert PruningSpec.model_validate({**plain, "rounds": 2, "recovery": {"kind": "lora"}}).total_rounds == 3 * (2 + 1)
    assert PruningSpec.model_validate({**plain, "target_ratio": 0.2, "recovery": {"kind": "bias"}}).total_rounds == 4


def test_a_refit_is_the_methods_own_where_nothing_else_is_asked_for() -> None:
    def refit(method: str, **recovery: Any) -> tuple[str, float, bool]:
        spec = PruningSpec.model_validate({"target_ratio": 0.2, "method": method, "recovery": recovery})
        return spec.refit_target, spec.refit_damping, spec.needs_reference

    assert refit("secateur") == ("model", DAMPING, True)
    assert refit("secateur-gradient") == ("layer", 10.0, False)
    assert refit("sparsegpt") == ("layer", 0.01, False)
    assert refit("sparsegpt", target="model", damping=0.5) == ("model", 0.5, True)
    assert refit("wanda", kind="least-squares", target="layer") == ("layer", DAMPING, False)
    assert not refit("wanda")[2], "no refit, no reference"


@pytest.mark.parametrize(("scorer", "allocator"), product(get_args(Scorer), get_args(Allocator)))
def test_every_mix_is_let_in_but_ranking_what_has_no_scores_yet(scorer: Scorer, allocator: Allocator) -> None:
    parts = {"scoring": {"kind": scorer}, "allocation": {"kind": allocator}}
    if scorer in LAYERWISE_SCORERS and allocator == "threshold":
        with pytest.raises(ValidationError, match="allowed: cosine, inner, lsps, uniform") as caught:
            PruningSpec.model_validate({"target_ratio": 0.2, "method": "random", **parts})
        assert [error["loc"] for error in caught.value.errors()] == [("allocation",)]
    else:
        PruningSpec.model_validate({"target_ratio": 0.2, "method": "random", **parts})
