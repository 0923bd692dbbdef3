"""Requests made up from the OpenAPI document: none is answered with a 500, every answer is one that the document tells."""

from collections.abc import Callable
from contextlib import suppress
from typing import Any

import httpx2
import pytest
import schemathesis
from fastapi import routing
from hypothesis import HealthCheck, Phase, given, seed, strategies
from hypothesis import settings as trials
from hypothesis.errors import Unsatisfiable
from schemathesis import APIOperation, BaseSchema, Case, GenerationMode
from schemathesis.core.result import Ok
from schemathesis.transport import requests
from sqlalchemy.orm import Session

from app.config import Settings, get_settings
from app.fleet import repository as fleet
from app.http import prefer
from tests.api import play
from tests.api.test_webhooks import SECRET
from tests.hub import FakeHub
from tests.patience import PATIENCE

STREAM_SECONDS = 0.3
"""A stream of a job that has not ended is left this long after its first byte."""

MakeJobs = Callable[[], list[str]]


@pytest.fixture
def equipped(hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    """A service that refuses nothing for what it lacks, and keeps nobody waiting."""
    monkeypatch.setenv("SECATEUR_WEBHOOK_SECRET", SECRET)
    monkeypatch.setattr(prefer, "LONGEST", 0)
    monkeypatch.setattr(routing, "_PING_INTERVAL", STREAM_SECONDS)  # a reader looks at the clock when something comes
    read = requests.read_event_stream
    monkeypatch.setattr(requests, "read_event_stream", lambda chunks, _, most: read(chunks, STREAM_SECONDS, most))
    get_settings.cache_clear()


@pytest.fixture
def make_jobs(
    equipped: None, api: httpx2.Client, body: dict[str, Any], session: Session, settings: Settings
) -> MakeJobs:
    """A worker and a scheduler that are alive, a job that waits, one that has failed, and one that has succeeded, with all it can have."""

    def make() -> list[str]:
        fleet.beat(session, "worker", "worker", {})
        fleet.beat(session, "scheduler", "scheduler", {})
        waiting, failed, succeeded = (str(api.post("/v1/jobs", json=body).json()["id"]) for _ in range(3))
        play.fail(session, failed, play.start(session, failed))
        attempt = play.start(session, succeeded)
        play.progress(session, succeeded, attempt, 0.5)
        play.finish_round(session, succeeded, attempt, 1)
        play.succeed(session, settings, succeeded, attempt)
        return [waiting, failed, succeeded]

    return make


@pytest.fixture
def document(equipped: None, url: str) -> BaseSchema:
    """What the document allows may still make no sense for this job or model, so that a refusal of it is right."""
    document = schemathesis.openapi.from_url(f"{url}/openapi.json")
    document.config.checks.update(excluded_check_names=["positive_data_acceptance"])
    document.config.generation.update(with_security_parameters=False)
    return document


@strategies.composite
def asked(
    draw: strategies.DrawFn, operation: APIOperation, mode: GenerationMode, jobs: list[str], body: dict[str, Any]
) -> Case:
    """A request; most of the valid ones are about jobs and models that are there."""
    case = draw(operation.as_strategy(generation_mode=mode))
    if mode is GenerationMode.POSITIVE and draw(strategies.sampled_from([True, True, True, False])):
        there = {"job_id": draw(strategies.sampled_from(jobs)), "name": "config.json"}
        case.path_parameters |= {name: there[name] for name in case.path_parameters if name in there}
        if isinstance(case.body, dict) and "model_id" in case.body:
            kept = draw(strategies.sets(strategies.sampled_from(sorted(case.body)), max_size=3))
            required = body if "method" in case.body else {"model_id": body["model_id"]}
            case.body = {name: case.body[name] for name in kept} | required
    return case


@pytest.mark.parametrize("examples", [6, pytest.param(300, marks=[pytest.mark.slow, pytest.mark.timeout(3600)])])
@pytest.mark.parametrize("mode", GenerationMode)
def test_answers_are_those_of_the_document(
    subtests: pytest.Subtests,
    document: BaseSchema,
    api: httpx2.Client,
    body: dict[str, Any],
    make_jobs: MakeJobs,
    mode: GenerationMode,
    examples: int,
) -> None:
    repeatedly = trials(
        max_examples=examples,
        database=None,
        deadline=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )

    def ask(case: Case) -> None:
        case.call_and_validate(headers={"Authorization": api.headers["Authorization"]}, timeout=PATIENCE)

    for result in document.get_all_operations():
        assert isinstance(result, Ok), result
        operation = result.ok()
        with subtests.test(operation=operation.label), suppress(Unsatisfiable):  # nothing can be wrong with it
            seed(0)(repeatedly(given(asked(operation, mode, make_jobs(), body))(ask)))()
