"""Workers as an operator and a client see them: the list, draining, and what a job waits for."""

import json
from functools import partial
from typing import Any

import httpx2
import pytest
from sqlalchemy import text
from sqlalchemy.orm import Session

from app.auth import service as auth
from app.config import Settings
from app.db import session as database
from app.db.session import session_factory
from app.fleet import repository as fleet
from app.jobs.models import Job
from app.jobs.service import offers_of
from secateur.client import Client
from secateur.contract.workers import Drain
from tests.api import play
from tests.forked import secateur

GIB = 2**30


@pytest.fixture(autouse=True)
def _workers_that_beat_once_stay_live(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECATEUR_HEARTBEAT_INTERVAL", "3600")
    monkeypatch.setenv("SECATEUR_LEASE_TTL", "7200")


@pytest.fixture
def api(whole: httpx2.Client) -> httpx2.Client:
    """A client that may do everything."""
    return whole


def beat(session: Session, name: str, memory: int | None = 80 * GIB, device: str = "cuda", **labels: str) -> None:
    known = {} if memory is None else {"memory_bytes": memory}
    fleet.beat(session, name, "worker", {"device": device, "labels": labels, **known})
    offers_of.cache_clear()


def test_an_operator_lists_drains_and_resumes(
    api: httpx2.Client, body: dict[str, Any], session: Session, url: str
) -> None:
    beat(session, "host:1", gpu="h100")
    fleet.beat(session, "host:2", "scheduler", {})
    job_id = api.post("/v1/jobs", json=body).json()["id"]
    play.start(session, job_id)
    session.query(Job).update({"worker": "host:1"})
    session.commit()
    [worker] = api.get("/v1/workers").json()["items"]
    assert (worker["name"], worker["live"], worker["job_id"], worker["drain"]) == ("host:1", True, job_id, None)
    assert (worker["labels"], worker["memory_bytes"], worker["device"]) == ({"gpu": "h100"}, 80 * GIB, "cuda")
    for order, drain in (({}, "finish"), ({"now": True}, "release"), ({"now": False}, "finish")):
        assert api.post("/v1/workers/host:1/drain", json=order).status_code == 204
        assert api.get("/v1/workers").json()["items"][0]["drain"] == drain
    assert "secateur_workers_draining 1.0" in httpx2.get(f"{url}/metrics").text
    assert api.post("/v1/workers/host:1/resume").status_code == 204
    assert api.get("/v1/workers").json()["items"][0]["drain"] is None
    for path in ("host:2/drain", "none/drain", "none/resume"):
        unknown = api.post(f"/v1/workers/{path}", json={} if "drain" in path else None)
        assert (unknown.status_code, unknown.json()["code"]) == (404, "not_found")
    assert api.post("/v1/workers/host:1/drain", json={"later": True}).status_code == 422
    _, secret = auth.create(session, "user")
    refused = api.get("/v1/workers", headers={"Authorization": f"Bearer {secret}"})
    assert (refused.status_code, refused.json()["code"]) == (403, "insufficient_scope")


def test_the_commands(settings: Settings, session: Session) -> None:
    beat(session, "host:1", zone="a", gpu="h100")

    run = partial(secateur, "workers")
    assert run("list").stdout == "host:1  live  idle  cuda  80.0 GiB  gpu=h100,zone=a\n"
    assert run("drain", "host:1").returncode == 0
    assert [worker["drain"] for worker in json.loads(run("list", "--json").stdout)] == ["finish"]
    assert run("drain", "host:1", "--now").returncode == 0
    assert "draining (release)" in run("list").stdout
    assert run("resume", "host:1").returncode == 0 and "  live  " in run("list").stdout
    unknown = run("drain", "host:9")
    assert unknown.returncode == 2 and "no worker host:9" in unknown.stderr


def test_a_job_says_what_it_waits_for(api: httpx2.Client, body: dict[str, Any], session: Session, url: str) -> None:
    asked = body | {"requirements": {"labels": {"gpu": "h100"}, "memory_bytes": 100 * GIB}}
    beat(session, "a", gpu="a10", memory=24 * GIB)
    answer = api.post("/v1/jobs", json=asked)
    assert answer.status_code == 202
    words = "a worker with 100.0 GiB of memory and the labels gpu=h100; the live workers offer: 24.0 GiB gpu=a10"
    job_url = answer.headers["Location"]
    for view in (answer.json(), api.get(job_url).json(), api.post("/v1/jobs?validate_only=true", json=asked).json()):
        assert view["waiting_for"] == words
    plain = api.post("/v1/jobs", json=body).json()
    assert plain["waiting_for"] is None
    assert httpx2.get(f"{url}/readyz").json()["unheld_jobs"] == 1
    assert "secateur_queue_unheld 1.0" in httpx2.get(f"{url}/metrics").text
    beat(session, "b", gpu="h100", zone="a", memory=None)
    assert api.get(job_url).json()["waiting_for"] is None, "memory that is not known may suffice"
    for name in ("a", "b"):
        api.post(f"/v1/workers/{name}/drain", json={}).raise_for_status()
    offers_of.cache_clear()
    assert api.get(job_url).json()["waiting_for"].endswith("; no live worker takes jobs")
    assert httpx2.get(f"{url}/readyz").json()["unheld_jobs"] == 2
    assert api.post(f"{job_url}/cancel").json()["waiting_for"] is None


def test_the_estimate_is_required_unless_the_request_says_otherwise(
    api: httpx2.Client, body: dict[str, Any], session: Session
) -> None:
    plan = api.post("/v1/jobs?validate_only=true", json=body).json()
    assert plan["memory_bytes"] > 0 and plan["waiting_for"].startswith("a worker with ")

    def required(**requirements: Any) -> tuple[int | None, dict[str, str], int]:
        made = api.post("/v1/jobs", json=body | {"requirements": requirements, "priority": 3})
        assert made.status_code == 202, made.text
        session.rollback()
        job = session.get_one(Job, made.json()["id"])
        return job.required_memory_bytes, job.required_labels, job.priority

    assert required() == (plan["memory_bytes"], {}, 3)
    assert required(memory_bytes=7, labels={"zone": "a"}) == (7, {"zone": "a"}, 3)


@pytest.mark.parametrize(
    ("workers", "requirements", "status"),
    [
        ([], {}, 202),
        ([1000], {}, 422),
        ([1000, 80 * GIB], {}, 202),
        ([1000, None], {}, 202),
        ([1000], {"memory_bytes": 80 * GIB}, 202),
        ([1000], {"labels": {"gpu": "b"}}, 202),
        ([1000], {"labels": {"gpu": "a"}}, 422),
    ],
    ids=["no worker yet", "too small", "one suffices", "one is not known", "waits for a larger", "waits for a label", "of the label"],
)  # fmt: skip
def test_when_a_job_is_refused_as_too_large(
    workers: list[int | None],
    requirements: dict[str, Any],
    status: int,
    api: httpx2.Client,
    body: dict[str, Any],
    session: Session,
) -> None:
    for number, memory in enumerate(workers):
        beat(session, f"w{number}", memory, gpu="a")
    answer = api.post("/v1/jobs", json=body | {"requirements": requirements})
    assert answer.status_code == status, answer.text
    assert status == 202 or "requirements.memory_bytes" in answer.json()["detail"]


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("priority", 11),
        ("priority", -11),
        ("priority", 0.5),
        ("requirements", {"memory_bytes": 0}),
        ("requirements", {"memory_bytes": 2**63}),
        ("requirements", {"labels": {"": "x"}}),
        ("requirements", {"gpus": 2}),
    ],
)
def test_what_is_no_priority_and_no_requirement(
    field: str, value: Any, api: httpx2.Client, body: dict[str, Any]
) -> None:
    refused = api.post("/v1/jobs", json=body | {field: value})
    assert refused.status_code == 422 and refused.json()["errors"][0]["field"].startswith(field)


def test_labels_of_a_worker(monkeypatch: pytest.MonkeyPatch) -> None:
    def labels(value: str) -> dict[str, str]:
        monkeypatch.setenv("SECATEUR_WORKER_LABELS", value)
        return Settings().worker_labels

    assert labels("gpu=h100, zone=a=b,") == {"gpu": "h100", "zone": "a=b"} and labels("") == {}
    for wrong in ("gpu", "=x", "g u=x"):
        with pytest.raises(ValueError, match="worker_labels"):
            labels(wrong)


def test_a_full_pool_is_told_at_once(api: httpx2.Client, monkeypatch: pytest.MonkeyPatch, settings: Settings) -> None:
    api.get("/v1/jobs").raise_for_status()
    monkeypatch.setattr(settings, "database_pool", 1)
    monkeypatch.setattr(database, "POOL_TIMEOUT", 0.05)
    session_factory().kw["bind"].dispose()
    session_factory.cache_clear()
    with session_factory()() as held:
        held.execute(text("SELECT 1"))
        busy = api.get("/v1/jobs")
    assert (busy.status_code, busy.json()["code"]) == (503, "database_unavailable")
    assert "in use" in busy.json()["detail"] and busy.headers["Retry-After"] == "1"
    assert api.get("/v1/jobs").status_code == 200


def test_the_client(api: httpx2.Client, url: str, session: Session) -> None:
    beat(session, "host:1", gpu="h100")
    with Client(url, api.headers["Authorization"].removeprefix("Bearer ")) as client:
        client.workers.drain("host:1", now=True)
        [worker] = client.workers.list()
        assert (worker.name, worker.drain, worker.labels) == ("host:1", Drain.RELEASE, {"gpu": "h100"})
        client.workers.resume("host:1")
        assert client.workers.list()[0].drain is None
