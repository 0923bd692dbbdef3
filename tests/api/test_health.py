"""Liveness, readiness with a verdict on each part, metrics; the doorbell when the broker is away."""

import json
import re
import socket
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx2
import pytest
import redis
import yaml
from prometheus_client.parser import text_string_to_metric_families
from sqlalchemy import func, update
from sqlalchemy.orm import Session

from app.config import Settings, get_settings
from app.db.session import session_factory
from app.fleet import repository as fleet
from app.fleet.models import Worker
from app.jobs import dispatch, leases
from app.jobs.models import Job
from tests.api import play
from tests.patience import PATIENCE, wait_for

DEPLOY = Path(__file__).parents[2] / "deploy"


def _ready(url: str, *exclude: str) -> tuple[int, dict[str, Any]]:
    response = httpx2.get(f"{url}/readyz", params={"exclude": exclude})
    return response.status_code, response.json()


def test_ready_with_a_live_worker(url: str, session: Session, settings: Settings) -> None:
    parts = {"database": "ok", "broker": "ok", "workers": "ok", "scheduler": "ok", "unheld_jobs": 0, "storage": "ok"}
    nobody = {"workers": "no live worker", "scheduler": "no live scheduler"}
    assert _ready(url) == (503, {**parts, **nobody, "ready": False})
    fleet.beat(session, "scheduler-1", "scheduler", {})
    assert _ready(url)[0] == 503
    fleet.beat(session, "worker-1", "worker", {"device": "cpu"})
    assert _ready(url) == (200, {**parts, "ready": True})
    fleet.leave(session, "scheduler-1")
    assert _ready(url) == (503, {**parts, "ready": False, "scheduler": "no live scheduler"})
    for name in ("scheduler-2", "scheduler-3"):
        fleet.beat(session, name, "scheduler", {})
    fleet.leave(session, "scheduler-2")
    assert _ready(url)[0] == 200, "one scheduler of several is enough"
    long_ago = func.now() - func.make_interval(0, 0, 0, 0, 0, 10)
    session.execute(update(Worker).values(last_seen_at=long_ago).where(Worker.kind == "worker"))
    session.commit()
    assert _ready(url)[0] == 503
    fleet.beat(session, "worker-1", "worker", {"device": "cpu"})
    assert _ready(url)[0] == 200
    fleet.leave(session, "worker-1")
    assert _ready(url)[0] == 503


def test_what_is_excluded_does_not_count(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert _ready(url, "workers", "scheduler")[0] == 200
    monkeypatch.setenv("SECATEUR_BROKER_URL", "redis://127.0.0.1:9/0")
    get_settings.cache_clear()
    assert _ready(url, "workers", "scheduler")[0] == 503
    status, told = _ready(url, "workers", "broker", "scheduler")
    assert (status, told["ready"], told["database"]) == (200, True, "ok")
    assert told["workers"] == "no live worker" and told["broker"].startswith("unreachable")
    assert _ready(url, "nothing")[0] == 422


def test_silent_processes_are_forgotten(session: Session) -> None:
    fleet.beat(session, "a", "worker", {})
    fleet.delete_silent(session, 3600)
    assert [worker.name for worker in fleet.live(session, 60)] == ["a"]
    session.execute(update(Worker).values(last_seen_at=func.now() - func.make_interval(0, 0, 0, 0, 2)))
    session.commit()
    fleet.delete_silent(session, 3600)
    assert session.get(Worker, "a", populate_existing=True) is None


def test_not_ready_without_broker_or_database(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECATEUR_BROKER_URL", "redis://127.0.0.1:9/0")
    monkeypatch.setenv("SECATEUR_DATABASE_URL", "postgresql+psycopg://hidden:hidden@127.0.0.1:9/x")
    session_factory().kw["bind"].dispose()
    get_settings.cache_clear()
    session_factory.cache_clear()
    status, verdicts = _ready(url)
    assert status == 503
    assert _ready(url, "workers", "broker", "scheduler")[0] == 503
    assert all(verdicts[part].startswith("unreachable") for part in ("database", "broker", "workers", "scheduler"))
    assert "hidden" not in str(verdicts)
    assert httpx2.get(f"{url}/healthz").json() == {"status": "ok"}
    away = httpx2.get(f"{url}/v1/jobs", headers={"Authorization": "Bearer x"})
    assert (away.status_code, away.json()["code"]) == (503, "database_unavailable")
    assert int(away.headers["Retry-After"]) > 0
    assert _samples(url)["secateur_database_up", ""] == 0


def _samples(url: str) -> dict[tuple[str, str], float]:
    """Values by name and by the one label that matters."""
    text = httpx2.get(f"{url}/metrics").text
    return {
        (sample.name, sample.labels.get("state") or sample.labels.get("route") or ""): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def test_metrics(api: httpx2.Client, url: str, body: dict[str, Any], session: Session) -> None:
    first = api.post("/v1/jobs", json=body).json()["id"]
    api.post("/v1/jobs", json=body)
    play.start(session, first)
    fleet.beat(session, "worker-1", "worker", {})
    for name in ("scheduler-1", "scheduler-2"):
        fleet.beat(session, name, "scheduler", {})
    api.get(f"/v1/jobs/{first}")
    api.get("/no/such/path")
    samples = _samples(url)
    assert samples["secateur_jobs", "queued"] == samples["secateur_jobs", "running"] == 1
    assert samples["secateur_jobs", "failed"] == 0
    assert samples["secateur_queue_depth", ""] == 1
    assert 0 < samples["secateur_queue_oldest_seconds", ""] < PATIENCE
    assert samples["secateur_schedulers_live", ""] == 2
    assert samples["secateur_workers_live", ""] == samples["secateur_database_up", ""] == 1
    assert samples["secateur_http_request_duration_seconds_count", "/v1/jobs/{job_id}"] == 1
    assert samples["secateur_http_request_duration_seconds_count", "unmatched"] == 1


def test_a_worker_is_woken(api: httpx2.Client, body: dict[str, Any], broker_url: str) -> None:
    api.post("/v1/jobs", json=body).raise_for_status()
    with redis.Redis.from_url(broker_url) as broker:
        wait_for(lambda: broker.llen("celery"))
        message = broker.lpop("celery")
    assert isinstance(message, bytes) and b"secateur.work" in message


def test_a_broker_that_is_away_or_hangs_stops_nobody(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    slept: list[float] = []
    for module in ("kombu.utils.functional", "redis.retry"):
        monkeypatch.setattr(f"{module}.sleep", slept.append)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setitem(dispatch.TRANSPORT_OPTIONS, "socket_timeout", 0.5)
        for port in (9, silent.getsockname()[1]):
            monkeypatch.setattr(settings, "broker_url", f"redis://127.0.0.1:{port}/0")
            dispatch.wake_worker()
        silent.setblocking(False)
        tries = 0
        with suppress(BlockingIOError):
            while True:
                silent.accept()[0].close()
                tries += 1
    assert sum(slept) + 0.5 * tries < 3 and tries > 0, "the seconds for which it holds up whoever rings"


def test_a_job_is_accepted_without_a_broker(
    api: httpx2.Client, body: dict[str, Any], settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(settings, "broker_url", "redis://127.0.0.1:9/0")
    response = api.post("/v1/jobs", json=body)
    assert response.status_code == 202
    assert api.get(response.headers["Location"]).json()["state"] == "queued"


def test_metrics_of_trouble(api: httpx2.Client, url: str, body: dict[str, Any], session: Session) -> None:
    job_id = api.post("/v1/jobs", json=body).json()["id"]
    attempt = play.start(session, job_id)
    play.finish_round(session, job_id, attempt, 1)
    session.execute(update(Job).values(lease_expires_at=func.now()))
    session.commit()
    leases.reap(session, play.LIMITS)
    fleet.beat(session, "w", "worker", {"device": "cpu", "memory_bytes": 8, "disk_free_bytes": 9})
    text = httpx2.get(f"{url}/metrics").text
    for line in (
        'secateur_retries_last_hour{code="worker_lost"} 1.0',
        'secateur_worker_disk_free_bytes{worker="w"} 9.0',
        'secateur_worker_memory_bytes{worker="w"} 8.0',
        "secateur_webhooks_pending 0.0",
    ):
        assert line in text
    assert 'secateur_step_seconds{method="piem-lsps"}' in text
    play.start(session, job_id)
    assert 'secateur_running_jobs{worker="' in httpx2.get(f"{url}/metrics").text


def test_rules_and_dashboard_ask_for_metrics_that_there_are(url: str) -> None:
    told = {family.name for family in text_string_to_metric_families(httpx2.get(f"{url}/metrics").text)}
    rules = yaml.safe_load((DEPLOY / "prometheus" / "alerts.yml").read_text())["groups"][0]["rules"]
    panels = json.loads((DEPLOY / "grafana" / "secateur.json").read_text())["panels"]
    asked = [rule["expr"] for rule in rules] + [target["expr"] for panel in panels for target in panel["targets"]]
    names = {name for expression in asked for name in re.findall(r"\bsecateur_\w+", expression)}
    assert len(rules) > 8 and len(panels) > 8 and len(names) > 10
    assert {re.sub(r"_(count|bucket)$", "", name) for name in names} <= told
    assert all(rule["annotations"]["runbook"] and rule["labels"]["severity"] in ("page", "ticket") for rule in rules)
