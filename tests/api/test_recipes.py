"""Recipes: one set of fields for the command line, the library and the API, and what is refused."""

import json
from pathlib import Path
from typing import Any

import httpx2
import pytest

from secateur import PruningError, Recipe, RecipeInvalid
from secateur.catalog.request import JobRequest


def test_yaml_and_json_are_read(tmp_path: Path) -> None:
    fields = {"model_id": "org/model", "target_ratio": [0.2, 0.5], "recovery": {"training": {"kind": "lora"}}}
    (tmp_path / "recipe.json").write_text(json.dumps(fields))
    (tmp_path / "recipe.yaml").write_text(
        "model_id: org/model  # a Hub id\ntarget_ratio: [0.2, 0.5]\nrecovery:\n  training: {kind: lora}\n"
    )
    for name in ("recipe.json", "recipe.yaml"):
        assert Recipe.load(tmp_path / name).fields == fields
    assert Recipe.parse(Recipe(fields).dump()).fields == fields


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("[1, 2]", "object of fields"),
        ("a: [", "not YAML"),
        ("7", "object of fields"),
        ("!!python/object:os.system {}", "not YAML"),
    ],
)
def test_what_is_no_recipe(text: str, says: str, tmp_path: Path) -> None:
    with pytest.raises(RecipeInvalid, match=says):
        Recipe.parse(text)
    (tmp_path / "recipe").write_bytes(b"\xff")
    for path in (tmp_path / "recipe", tmp_path / "none", tmp_path):
        with pytest.raises(RecipeInvalid, match="cannot be read") as caught:
            Recipe.load(path)
        assert isinstance(caught.value, PruningError) and caught.value.code == "invalid_request"


def test_every_field_at_fault_is_named() -> None:
    with pytest.raises(RecipeInvalid) as caught:
        Recipe({"target_ratio": 2, "method": "owl", "recovery": {"layerwise": {"kind": "x"}}}).spec()
    assert [reason.split(":")[0] for reason in caught.value.reasons] == [
        "target_ratio",
        "method",
        "recovery.layerwise.kind",
    ]
    assert "allowed: none, bias" in caught.value.message
    with pytest.raises(RecipeInvalid, match=r"layut: unknown field; allowed: .*layout"):
        Recipe({"layut": "padded"}).spec()


def test_given_fields_go_before_the_recipes() -> None:
    base = Recipe({"goal": {"parameters": 1e6}, "calibration": {"samples": 4}, "method": "wanda", "labels": {"a": "b"}})
    made = base.override({"target_ratio": 0.2, "calibration": {"dataset": "c4"}, "method": None})
    assert made.fields == {
        "calibration": {"samples": 4, "dataset": "c4"}, "method": "wanda", "labels": {"a": "b"}, "target_ratio": 0.2
    }  # fmt: skip
    assert made.service_fields == ["labels"]
    assert "goal" in made.override({"goal": {"bytes": 1}}).fields
    assert "target_ratio" not in made.override({"goal": {"bytes": 1}}).fields
    assert base.fields["calibration"] == {"samples": 4}, "unchanged"


def test_a_job_gives_its_own_recipe_back(api: httpx2.Client, body: dict[str, Any]) -> None:
    text = "A text that the owner of the job may have back. " * 30
    asked = body | {
        "calibration": {"texts": [text], "samples": 4, "sequence_length": 32},
        "recovery": {"training": {"kind": "lora", "rank": 4}},
        "labels": {"team": "nlp"},
    }
    job = api.post("/v1/jobs", json=asked).json()
    recipe = api.get(f"/v1/jobs/{job['id']}/recipe").json()
    assert recipe["calibration"]["texts"] == [text] and recipe["recovery"] == {"training": {"kind": "lora", "rank": 4}}
    assert "hub_token" not in recipe and "seed" not in recipe, "neither secrets nor defaults"
    again = api.post("/v1/jobs", json=recipe).json()
    assert again["request"] == job["request"]
    assert JobRequest.model_validate(recipe) == JobRequest.model_validate(Recipe.parse(Recipe(recipe).dump()).fields)
    assert api.get("/v1/jobs/00000000-0000-0000-0000-000000000000/recipe").status_code == 404
