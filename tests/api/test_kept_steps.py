"""Publishing a step over HTTP; tests/workers/test_kept_steps.py does it with a model."""

import uuid
from collections.abc import Callable
from typing import Any

import httpx2
import pytest
from sqlalchemy.orm import Session

from app.jobs import leases
from secateur.contract.keys import Scope
from tests.api import play


@pytest.fixture
def ended(api: httpx2.Client, body: dict[str, Any], session: Session) -> str:
    """A job that failed after its second of three rounds, with the parts of a training in its way."""
    asked = {**body, "rounds": 3, "labels": {"team": "nlp"}, "keep_steps": True}
    job_id: str = api.post("/v1/jobs", json=asked).json()["id"]
    attempt = play.start(session, job_id)
    steps: list[dict[str, Any]] = [
        {"kind": "baseline"},
        *({"kind": "round", "target_ratio": 0.2, "ratio": {"target": ratio, "reached": ratio}} for ratio in (0.0, 0.2)),
        {"kind": "training", "target_ratio": 0.2},
    ]
    for number, data in enumerate(steps):
        leases.record_step(session, uuid.UUID(job_id), attempt, number, data, {"step": number})
    play.fail(session, job_id, attempt)
    return job_id


def test_a_step_is_published_by_a_job_of_its_own(
    ended: str, api: httpx2.Client, make_client: Callable[..., httpx2.Client]
) -> None:
    path = f"/v1/jobs/{ended}/steps/2/publish"
    made = api.post(path, json={"publish": {"repo_id": "org/second"}}, headers={"Idempotency-Key": "k"})
    assert made.status_code == 202, made.text
    job = made.json()
    assert made.headers["Location"] == f"/v1/jobs/{job['id']}" and job["id"] != ended and job["state"] == "queued"
    request = job["request"]
    assert (request["target_ratio"], request["rounds"], request["keep_steps"]) == (0.2, 2, False)
    assert (request["resume_from"], request["labels"]) == ({"job": ended, "step": 2}, {"team": "nlp"})
    assert request["publish"]["repo_id"] == "org/second"
    again = api.post(path, json={"publish": {"repo_id": "org/second"}}, headers={"Idempotency-Key": "k"})
    assert again.json()["id"] == job["id"]
    steps = api.get(f"/v1/jobs/{job['id']}/steps").json()["items"]
    assert [step["number"] for step in steps] == [0, 1, 2]
    recipe = api.get(f"/v1/jobs/{job['id']}/recipe")
    assert (recipe.status_code, recipe.json()["code"]) == (409, "no_recipe")
    plain = api.post(path)
    assert plain.status_code == 202 and plain.json()["id"] != job["id"]
    other = make_client("bob")
    assert other.post(path).status_code == 404 and other.get(made.headers["Location"]).status_code == 404


def test_shares_are_at_most_the_ratio_that_the_step_reached(
    api: httpx2.Client, body: dict[str, Any], session: Session
) -> None:
    """Whole units seldom meet a ratio, and a request whose shares exceed its ratio is refused."""
    asked = {**body, "method": "shortgpt", "target_ratio": 0.3, "shares": {"layers": 0.3}, "keep_steps": True}
    job_id = api.post("/v1/jobs", json=asked).json()["id"]
    attempt = play.start(session, job_id)
    ratio = {"target": 0.3, "reached": 0.2917}
    steps: list[dict[str, Any]] = [{"kind": "baseline"}, {"kind": "round", "target_ratio": 0.3, "ratio": ratio}]
    for number, data in enumerate(steps):
        leases.record_step(session, uuid.UUID(job_id), attempt, number, data, {"step": number})
    play.fail(session, job_id, attempt)
    made = api.post(f"/v1/jobs/{job_id}/steps/1/publish")
    assert made.status_code == 202, made.text
    assert made.json()["request"]["shares"] == {"layers": pytest.approx(0.2917)}


def test_an_administrator_publishes_a_step_for_its_owner(
    ended: str, api: httpx2.Client, make_client: Callable[..., httpx2.Client]
) -> None:
    made = make_client("root", scopes=[Scope.ADMIN]).post(f"/v1/jobs/{ended}/steps/2/publish")
    assert made.status_code == 202 and api.get(made.headers["Location"]).status_code == 200
    told = api.get(f"/v1/jobs/{ended}/events?page_size=100").json()["items"][-1]
    assert (told["type"], told["data"]["action"]) == ("admin", "publish_step")


@pytest.mark.parametrize("number", [0, 1, 3, 4], ids=["baseline", "nothing removed", "part of a training", "no step"])
def test_a_step_without_a_model_is_not_published(number: int, ended: str, api: httpx2.Client) -> None:
    refused = api.post(f"/v1/jobs/{ended}/steps/{number}/publish")
    assert (refused.status_code, refused.json()["code"]) == (409, "step_not_kept")
    assert refused.json()["detail"].endswith("steps that have one: 2.")


def test_a_method_of_one_step_keeps_none(api: httpx2.Client, body: dict[str, Any]) -> None:
    refused = api.post("/v1/jobs", json={**body, "method": "dsgp", "keep_steps": True})
    assert refused.status_code == 422 and refused.json()["errors"][0]["field"] == "keep_steps"
