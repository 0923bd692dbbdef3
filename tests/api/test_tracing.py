"""Requests as OpenTelemetry spans, and the span that a job carries to its worker."""

import subprocess
import sys
import uuid
from collections.abc import Iterator
from typing import Any

import httpx2
import pytest
from sqlalchemy.orm import Session

from app import startup, tracing
from app.config import Settings, get_settings
from app.jobs.models import Job
from secateur.extras import MissingExtra
from tests.collectors import Collector, running

TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"


@pytest.fixture
def collector(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> Iterator[Collector]:
    tracing.tracer_provider.cache_clear()
    with running(Collector()) as server:
        monkeypatch.setenv("SECATEUR_OTLP_ENDPOINT", f"{server.url}/")
        get_settings.cache_clear()
        yield server
        shut_down()
    tracing.tracer_provider.cache_clear()


def shut_down() -> None:
    """Send the spans that wait to be sent."""
    provider = tracing.tracer_provider("secateur-api")
    assert provider is not None
    provider.shutdown()


def test_a_job_carries_the_span_of_its_request(
    collector: Collector, api: httpx2.Client, body: dict[str, Any], session: Session
) -> None:
    answer = api.post("/v1/jobs", json=body, headers={"traceparent": f"00-{TRACE}-{PARENT}-01"})
    assert answer.status_code == 202
    for path in ("/healthz", "/readyz", "/metrics"):
        api.get(path)
    job_id = answer.json()["id"]
    api.get(f"/v1/jobs/{job_id}/metrics")
    shut_down()
    assert collector.services == {"secateur-api"}
    request, metrics = collector.spans
    assert (request.name, metrics.name) == ("POST /v1/jobs", "GET /v1/jobs/{job_id}/metrics")
    assert (request.trace_id.hex(), request.parent_span_id.hex()) == (TRACE, PARENT)
    job = session.get(Job, uuid.UUID(job_id))
    assert job is not None and job.traceparent == f"00-{TRACE}-{request.span_id.hex()}-01"


def test_a_silent_collector_delays_no_request(collector: Collector, api: httpx2.Client, body: dict[str, Any]) -> None:
    collector.speaks.clear()
    assert api.post("/v1/jobs", json=body).status_code == 202


def test_without_a_collector_there_are_no_spans(api: httpx2.Client, body: dict[str, Any], session: Session) -> None:
    answer = api.post("/v1/jobs", json=body, headers={"traceparent": f"00-{TRACE}-{PARENT}-01"})
    job = session.get(Job, uuid.UUID(answer.json()["id"]))
    assert job is not None and job.traceparent is None


def test_no_exporter_is_imported_when_off(settings: Settings) -> None:
    """FastAPI itself imports the interface of OpenTelemetry."""
    code = (
        "import sys, app.main, workers.tracing\n"
        "app.main.create_app()\n"
        "print([name for name in sys.modules if name.startswith(('opentelemetry.exporter', 'opentelemetry.sdk.trace'))])"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout == "[]\n"


def test_a_missing_package_is_named(collector: Collector, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("secateur.extras.find_spec", lambda name: None)
    with pytest.raises(MissingExtra, match=r"^SECATEUR_OTLP_ENDPOINT needs .*pip install 'secateur\[telemetry\]'"):
        startup.check(get_settings(), owns_folder=False)
