"""The document is true: its examples are accepted, its answers are those of its schemas."""

from collections.abc import Iterator
from typing import Any

import httpx2
import pytest
from pydantic import BaseModel

from app import hub
from app.http import problem
from secateur.catalog import request
from secateur.catalog.request import JobRequest
from secateur.catalog.sources import ModelSource
from secateur.contract import catalog, jobs, keys

SMOLLM2_135M: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 576,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "vocab_size": 49_152,
    "max_position_embeddings": 8192,
    "tie_word_embeddings": True,
}

MODULES = problem, request, catalog, jobs, keys
"""Those that hold the document's schemas."""


@pytest.fixture
def document(url: str) -> dict[str, Any]:
    document: dict[str, Any] = httpx2.get(f"{url}/openapi.json").json()
    return document


def _operations(document: dict[str, Any]) -> Iterator[tuple[str, str, dict[str, Any]]]:
    for path, operations in document["paths"].items():
        for method, operation in operations.items():
            yield path, method, operation


def test_every_request_example_is_accepted(
    api: httpx2.Client, document: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        hub,
        "find_model",
        lambda endpoint, token, model_id, *_: ModelSource(model_id, None, "0" * 40, None, SMOLLM2_135M),
    )
    examples = document["components"]["schemas"]["JobRequest"]["examples"]
    assert len(examples) == 4
    for example in examples:
        response = api.post("/v1/jobs", json=example)
        assert response.status_code == 202, response.text
        stored = response.json()["request"]
        for name, value in (example | {"revision": "0" * 40}).items():
            kept = stored[name]
            assert holds(kept, value), name


def holds(kept: Any, value: Any) -> bool:
    """Whether ``kept`` has all fields of ``value``, and defaults beside them."""
    if not isinstance(value, dict) or not isinstance(kept, dict):
        return bool(kept == value)
    return all(name in kept and holds(kept[name], item) for name, item in value.items())


def test_every_response_example_is_one(document: dict[str, Any]) -> None:
    checked = 0
    for name, schema in document["components"]["schemas"].items():
        model: type[BaseModel] | None = next(
            (found for module in MODULES if (found := getattr(module, name, None)) is not None), None
        )
        for example in schema.get("examples", ()):
            assert model is not None, name
            shown = model.model_validate(example).model_dump(mode="json", exclude_unset=True)
            assert set(shown) == set(example), name
            checked += 1
    assert checked >= 5


def test_field_examples_are_allowed() -> None:
    beside = {"shares": {"structures": ["layers", "kv_groups", "channels"]}}
    for name, field in JobRequest.model_fields.items():
        for example in field.examples or ():
            request = (
                {"model_id": "a/b", "target_ratio": 0.2, "method": "secateur"} | beside.get(name, {}) | {name: example}
            )
            assert JobRequest.model_validate(request).model_dump(mode="json", exclude_unset=True)[name] == example


def test_problems_keys_and_names_are_documented(document: dict[str, Any]) -> None:
    names = [operation["operationId"] for _, _, operation in _operations(document)]
    assert len(names) == len(set(names))
    for path, method, operation in _operations(document):
        if not path.startswith("/v1"):
            continue
        assert operation["security"] == [{"ApiKey": []}], path
        for status in ("401", "422"):
            [kind] = operation["responses"][status]["content"]
            assert kind == "application/problem+json", (path, method)
        if "{job_id}" in path:
            assert "404" in operation["responses"], path
    assert document["components"]["securitySchemes"]["ApiKey"]["scheme"] == "bearer"
    assert "HTTPValidationError" not in str(document)


def test_parameters_and_statuses_that_no_signature_tells(document: dict[str, Any]) -> None:
    paths = document["paths"]
    assert {"label.KEY", "state"} <= {item["name"] for item in paths["/v1/jobs"]["get"]["parameters"]}
    assert "413" in paths["/v1/jobs"]["post"]["responses"]
    responses = paths["/v1/jobs/{job_id}/artifacts/{name}"]["get"]["responses"]
    for status in ("400", "404", "416"):
        assert list(responses[status]["content"]) == ["application/problem+json"]
    for status in ("200", "206"):
        assert list(responses[status]["content"]) == ["application/octet-stream"]


def test_references_resolve(document: dict[str, Any]) -> None:
    def walk(node: Any) -> Iterator[str]:
        if isinstance(node, dict):
            if isinstance(node.get("$ref"), str):
                yield node["$ref"]
            for value in node.values():
                yield from walk(value)
        elif isinstance(node, list):
            for value in node:
                yield from walk(value)

    for reference in set(walk(document)):
        target: Any = document
        for part in reference.removeprefix("#/").split("/"):
            target = target[part]


def test_the_pages_for_people(url: str) -> None:
    assert httpx2.get(f"{url}/docs").status_code == 200
