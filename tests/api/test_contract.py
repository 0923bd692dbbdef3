"""The contract as a file, and what keeps file, changelog, service and client together."""

import inspect
import re
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel

from app.main import create_app
from scripts import openapi as contract
from scripts.generate_client import generate
from secateur.client import AsyncClient, Client
from secateur.client._async import client as asynchronous
from secateur.client._sync import client as synchronous
from secateur.contract import catalog as catalog_schemas
from secateur.contract import datasets as dataset_schemas
from secateur.contract import jobs as job_schemas
from secateur.contract import keys as auth_schemas
from secateur.contract import workers as worker_schemas

DOCS = Path(__file__).parents[2] / "docs"
OPERATIONS = {
    "GET /v1/methods": "Client.methods",
    "POST /v1/models/inspect": "Client.inspect",
    "GET /v1/models": "Client.models",
    "GET /v1/texts": "Client.texts",
    "GET /v1/tasks": "Client.tasks",
    "GET /v1/usage": "Client.usage",
    "POST /v1/datasets": "Datasets.upload",
    "GET /v1/datasets": "Datasets.list",
    "GET /v1/datasets/{dataset_id}": "Datasets.get",
    "DELETE /v1/datasets/{dataset_id}": "Datasets.delete",
    "GET /v1/jobs/{job_id}/logs": "Job.logs",
    "POST /v1/jobs": "Jobs.create",
    "GET /v1/jobs": "Jobs.list",
    "GET /v1/jobs/{job_id}": "Jobs.get",
    "PATCH /v1/jobs/{job_id}": "Job.label",
    "DELETE /v1/jobs/{job_id}": "Job.delete",
    "POST /v1/jobs/{job_id}/cancel": "Job.cancel",
    "POST /v1/jobs/{job_id}/pause": "Job.pause",
    "POST /v1/jobs/{job_id}/resume": "Job.resume",
    "POST /v1/jobs/{job_id}/retry": "Job.retry",
    "GET /v1/jobs/{job_id}/events": "Job.events",
    "GET /v1/jobs/{job_id}/events/stream": "Job.stream",
    "GET /v1/jobs/{job_id}/steps": "Job.steps",
    "GET /v1/jobs/{job_id}/metrics": "Job.metrics",
    "POST /v1/jobs/{job_id}/steps/{number}/publish": "Job.publish_step",
    "GET /v1/jobs/{job_id}/recipe": "Job.recipe",
    "GET /v1/jobs/{job_id}/report": "Job.reports",
    "GET /v1/jobs/{job_id}/artifacts": "Job.artifacts",
    "GET /v1/jobs/{job_id}/artifacts/{name}": "Job.download",
    "GET /v1/keys": "Keys.list",
    "POST /v1/keys": "Keys.create",
    "PATCH /v1/keys/{key_id}": "Keys.change",
    "POST /v1/keys/{key_id}/rotate": "Keys.rotate",
    "PUT /v1/keys/{key_id}/hub-token": "Keys.hub_token",
    "DELETE /v1/keys/{key_id}": "Keys.revoke",
    "GET /v1/workers": "Workers.list",
    "POST /v1/workers/{name}/drain": "Workers.drain",
    "POST /v1/workers/{name}/resume": "Workers.resume",
}
"""Every operation below ``/v1``, and the client's method for it."""


@pytest.fixture(scope="module")
def document() -> dict[str, Any]:
    return create_app().openapi()


def test_the_stored_contract_is_the_services() -> None:
    stored = (DOCS / "openapi.json").read_text()
    assert contract.document() == stored, "the contract has changed: 'make openapi', and say in CHANGELOG.md what has"


def test_the_changelog_names_the_contract() -> None:
    changelog = (DOCS.parent / "CHANGELOG.md").read_text()
    newest = re.search(r"contract `([0-9a-f]{12})`", changelog)
    digest = contract.digest((DOCS / "openapi.json").read_text())
    assert newest and newest[1] == digest, (
        f"the newest entry of CHANGELOG.md must say what changed in contract `{digest}`"
    )


def test_every_operation_has_a_method(document: dict[str, Any]) -> None:
    operations = {
        f"{method.upper()} {path}"
        for path, item in document["paths"].items()
        for method in item
        if path.startswith("/v1/")
    }
    assert operations == OPERATIONS.keys()
    for module in (synchronous, asynchronous):
        for target in OPERATIONS.values():
            owner, method = target.split(".")
            assert callable(getattr(getattr(module, owner if module is synchronous else f"Async{owner}"), method))


def test_the_client_asks_for_paths_and_parameters_that_exist(document: dict[str, Any]) -> None:
    source = inspect.getsource(asynchronous)
    source = (
        source.replace("{self.id}", "{job_id}")
        .replace("{self._path}", "/v1/jobs/{job_id}")
        .replace("/{what}", "/cancel")
    )
    known = set(document["paths"])
    for path in re.findall(r'"(/v1/[^"]*)"', source):
        assert path in known, path
    parameters = {
        each["name"]
        for item in document["paths"].values()
        for operation in item.values()
        for each in operation.get("parameters", ())
    }
    used = set(re.findall(r'parameters\["(\w+)"\]|params=\{"(\w+)"', source))
    assert {name for pair in used for name in pair if name} <= parameters
    assert {"Last-Event-ID", "If-None-Match", "Prefer", "Idempotency-Key"} <= set(
        re.findall(r'"([A-Z][A-Za-z-]+)":', source)
    )


def test_the_clients_models_are_the_services(document: dict[str, Any]) -> None:
    answered = {
        reference.rpartition("/")[2]
        for path, item in document["paths"].items() if path.startswith("/v1/")
        for operation in item.values()
        for status, response in operation["responses"].items() if status.startswith("2")
        for reference in re.findall(r"#/components/schemas/\w+", str(response.get("content", "")))
    }  # fmt: skip
    models = {
        name: model
        for module in (job_schemas, auth_schemas, catalog_schemas, dataset_schemas, worker_schemas)
        for name, model in vars(module).items()
        if isinstance(model, type) and issubclass(model, BaseModel)
    }
    for name in answered - {"ServerSentEvent"}:
        assert name in models, f"the client has no model {name}"
        assert set(document["components"]["schemas"][name]["properties"]) == set(models[name].model_fields), name


def test_the_synchronous_client_is_made_from_the_asynchronous_one(tmp_path: Path) -> None:
    generate(tmp_path / "client")
    made = (tmp_path / "client" / "_sync" / "client.py").read_text()
    assert made == Path(inspect.getsourcefile(Client) or "").read_text(), "run 'make client'"
    assert "await" not in made and "Async" not in made and "await" in inspect.getsource(AsyncClient)
