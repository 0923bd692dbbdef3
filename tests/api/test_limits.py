"""What one API key may ask for: requests, jobs, sizes, time, space."""

import asyncio
import datetime as dt
import os
import subprocess
import sys
import uuid
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx2
import pytest
from sqlalchemy import update
from sqlalchemy.orm import Session, sessionmaker

from app.auth.models import ApiKey
from app.auth.service import Caller
from app.config import Settings, get_settings
from app.db.session import session_factory
from app.fleet import repository as fleet
from app.http import rate
from app.http.problem import Problem
from app.jobs import leases, service
from app.jobs.models import Job
from app.storage.service import tensors_folder
from app.storage.store import open_store
from secateur.catalog.request import JobRequest
from secateur.contract.keys import USER
from tests.api import play
from tests.test_leases import _at_once
from tests.workers.conftest import ROOT
from workers import scheduler

Change = Callable[..., Settings]


@pytest.fixture
def change(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> Change:
    """Set settings by name; what they are then."""

    def set_all(**values: object) -> Settings:
        for name, value in values.items():
            monkeypatch.setenv(f"SECATEUR_{name.upper()}", str(value))
        get_settings.cache_clear()
        return get_settings()

    return set_all


@pytest.fixture
def noon(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stop the clock of the rate limit at noon, so that no window of a day ends during the test."""
    monkeypatch.setattr(rate, "time", SimpleNamespace(time=lambda: 20_000.5 * 86_400))


@pytest.mark.usefixtures("noon")
def test_the_rate_is_by_key(change: Change, url: str, make_client: Callable[..., httpx2.Client]) -> None:
    change(rate_limit="3/day")
    alice, bob = make_client("alice"), make_client("bob")
    answers = [alice.get("/v1/methods") for _ in range(4)]
    assert [answer.status_code for answer in answers] == [200, 200, 200, 429]
    assert [answer.headers["RateLimit"].split(";")[1] for answer in answers] == ["r=2", "r=1", "r=0", "r=0"]
    assert answers[0].headers["RateLimit-Policy"] == '"key";q=3;w=86400'
    assert 1 <= int(answers[3].headers["Retry-After"]) <= 86_400 and answers[3].json()["code"] == "rate_limited"
    assert alice.get("/v1/jobs").status_code == 429, "on every route"
    assert bob.get("/v1/jobs").status_code == 200
    assert httpx2.get(f"{url}/healthz").status_code == 200


@pytest.mark.usefixtures("noon")
def test_replicas_take_shares_of_a_large_rate(change: Change, monkeypatch: pytest.MonkeyPatch) -> None:
    settings, key_id = change(rate_limit="300/day"), uuid.uuid4()
    lone = [rate.count(settings, uuid.UUID(int=1))["RateLimit"].split(";")[1] for _ in range(300)]
    assert lone == [f"r={left}" for left in reversed(range(300))]
    replicas, answered = [rate._Taken(0.0), rate._Taken(0.0)], 0
    with suppress(Problem):
        while answered < 1000:
            monkeypatch.setattr(rate, "_taken", replicas[answered % 2])
            rate.count(settings, key_id)
            replicas[answered % 2] = rate._taken
            answered += 1
    assert 297 <= answered <= 300, "what one has taken is lost to the other"


def test_without_the_broker_nobody_is_limited(change: Change, make_client: Callable[..., httpx2.Client]) -> None:
    change(rate_limit="1/minute", broker_url="redis://127.0.0.1:9/0")
    client = make_client("alice")
    answers = [client.get("/v1/methods") for _ in range(3)]
    assert [answer.status_code for answer in answers] == [200] * 3 and "RateLimit" not in answers[0].headers


def test_open_jobs(
    change: Change, api: httpx2.Client, body: dict[str, Any], make_client: Callable[..., httpx2.Client]
) -> None:
    change(max_open_jobs=2)
    first = api.post("/v1/jobs", json=body).json()
    headers = {"Idempotency-Key": "second"}
    assert api.post("/v1/jobs", json=body, headers=headers).status_code == 202
    full = api.post("/v1/jobs", json=body)
    assert (full.status_code, full.json()["code"]) == (429, "too_many_jobs") and int(full.headers["Retry-After"]) > 0
    assert api.post("/v1/jobs", json=body, headers=headers).status_code == 202, "which was accepted before"
    assert make_client("bob").post("/v1/jobs", json=body).status_code == 202
    api.post(f"/v1/jobs/{first['id']}/cancel").raise_for_status()
    assert api.post("/v1/jobs", json=body).status_code == 202


def test_open_jobs_when_many_ask_at_once(
    change: Change, sessions: Any, api: httpx2.Client, body: dict[str, Any], session: Session
) -> None:
    settings = change(max_open_jobs=3)
    api.get("/v1/jobs")
    caller = Caller(session.query(ApiKey).one().id, USER)
    session.rollback()
    request = JobRequest.model_validate(body)

    def submit(session: Session) -> int:
        try:
            asyncio.run(service.create(settings, caller, request, None))
        except Problem as problem:
            return problem.status
        return 202

    assert sorted(_at_once(sessions, *([submit] * 8))) == [202] * 3 + [429] * 5


@pytest.fixture
def sessions(settings: Settings) -> sessionmaker[Session]:
    return session_factory()


def test_running_jobs(
    api: httpx2.Client, body: dict[str, Any], session: Session, make_client: Callable[..., httpx2.Client]
) -> None:
    bob = make_client("bob")
    ids = [uuid.UUID(client.post("/v1/jobs", json=body).json()["id"]) for client in (api, api, api, bob)]
    fleet.beat(session, "w", "worker", {})

    def claim() -> uuid.UUID | None:
        found = leases.claim_next(session, "w", 60, 2)
        return None if found is None else found.job_id

    assert [claim() for _ in ids] == [ids[0], ids[3], ids[1], None], "the third job waits: its key has two at work"
    leases.release(session, ids[0], 1)
    assert [claim(), claim()] == [ids[0], None]


def test_running_jobs_when_many_claim_at_once(
    api: httpx2.Client, body: dict[str, Any], sessions: Any, session: Session
) -> None:
    for _ in range(6):
        api.post("/v1/jobs", json=body).raise_for_status()
    fleet.beat(session, "w", "worker", {})
    claims = _at_once(sessions, *[lambda s: leases.claim_next(s, "w", 60, 2) for _ in range(6)])
    assert sum(isinstance(claim, leases.Claim) for claim in claims) == 2


def test_size(change: Change, api: httpx2.Client, body: dict[str, Any]) -> None:
    size = api.post("/v1/models/inspect", json={"model_id": body["model_id"]}).json()["shape"]["parameters"]
    change(max_model_parameters=size)
    assert api.post("/v1/jobs", json=body).status_code == 202
    change(max_model_parameters=size - 1)
    refused = api.post("/v1/jobs", json=body)
    assert (refused.status_code, refused.json()["code"]) == (422, "model_too_large")
    assert refused.json()["errors"][0]["field"] == "model_id"


def test_files_are_kept_for_so_long(
    change: Change, api: httpx2.Client, body: dict[str, Any], session: Session, settings: Settings
) -> None:
    settings = change(artifact_retention=3600, checkpoint_retention=3600)
    published = {**body, "publish": {"repo_id": "org/small"}}
    names = {"old": published, "young": published, "unpublished": body, "failed": body}
    jobs = {name: api.post("/v1/jobs", json=request).json()["id"] for name, request in names.items()}
    nowhere = update(Job).values(request=Job.request.op("-")("publish"))  # a service with a folder publishes otherwise
    session.execute(nowhere.where(Job.id == jobs["unpublished"]))
    session.commit()
    for name, job_id in jobs.items():
        attempt = play.start(session, job_id)
        play.finish_round(session, job_id, attempt, 1)
        open_store(settings).create(f"{tensors_folder(job_id)}step", b"x")
        if name == "failed":
            play.fail(session, job_id, attempt)
        else:
            play.succeed(session, settings, job_id, attempt)
    expired = update(Job).values(expires_at=Job.expires_at - dt.timedelta(hours=2))
    session.execute(expired.where(Job.id != jobs["young"]))
    session.commit()
    scheduler.delete_leftovers(session, settings)
    left = {name: len(api.get(f"/v1/jobs/{job_id}/artifacts").json()["items"]) for name, job_id in jobs.items()}
    assert left == {"old": 0, "young": 2, "unpublished": 2, "failed": 0}
    stored = {found.key.split("/")[1] for found in open_store(settings).listing("jobs")}
    assert stored == {jobs["young"], jobs["unpublished"]}
    shown = {name: api.get(f"/v1/jobs/{job_id}").json() for name, job_id in jobs.items()}
    assert {name for name, job in shown.items() if job["expires_at"] is None} == {"unpublished"}
    ends = [dt.datetime.fromisoformat(shown["young"][name]) for name in ("finished_at", "expires_at")]
    assert ends[1] - ends[0] == dt.timedelta(hours=1)


def test_a_key_that_stores_too_much_makes_no_more_jobs(
    change: Change, api: httpx2.Client, body: dict[str, Any], session: Session
) -> None:
    settings = change(max_stored_bytes=10_000)
    job_id = api.post("/v1/jobs", json=body).json()["id"]
    play.succeed(session, settings, job_id, play.start(session, job_id))
    refused = api.post("/v1/jobs", json=body)
    assert (refused.status_code, refused.json()["code"]) == (403, "storage_quota_exceeded")
    assert "10,248 bytes; 10,000 are allowed" in refused.json()["detail"]
    assert api.delete(f"/v1/jobs/{job_id}").status_code == 204
    assert api.post("/v1/jobs", json=body).status_code == 202


def test_bad_settings(change: Change) -> None:
    for name, value in (("rate_limit", "lots"), ("secret_keys", "short"), ("max_open_jobs", "0")):
        with pytest.raises(ValueError, match=name):
            change(**{name: value})
        change(**{name: {"rate_limit": "1/second", "max_open_jobs": "1"}.get(name, "A" * 43 + "=")})


def test_secrets_in_files(tmp_path: Path, settings: Settings) -> None:
    (tmp_path / "secateur_hf_token").write_text("hf_of_a_file\n")
    (tmp_path / "secateur_broker_url").write_text("redis://file:1/0")
    script = "from app.config import Settings; s = Settings(); print(s.hf_token.get_secret_value(), s.broker_url)"
    environment = {name: value for name, value in os.environ.items() if "HF_TOKEN" not in name}
    done = subprocess.run(
        [sys.executable, "-c", script],
        env=environment | {"SECATEUR_SECRETS_DIR": str(tmp_path)},
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    assert done.stdout.split() == ["hf_of_a_file", settings.broker_url], done.stderr
