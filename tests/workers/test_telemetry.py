"""What the operator's own systems see of jobs: OpenTelemetry spans and MLflow runs. Neither system can delay or lose a job."""

import subprocess
from collections.abc import Callable, Iterator
from itertools import pairwise

import pytest
from opentelemetry.proto.trace.v1.trace_pb2 import Span, Status
from sqlalchemy import select
from sqlalchemy.orm import Session

from app.config import Settings, get_settings
from app.fleet import repository as fleet
from app.jobs import dispatch, leases, transitions
from app.jobs.transitions import Trigger
from app.tracking import mlflow as rest
from app.tracking import service as tracking
from app.tracking.mlflow import MlflowUnavailable
from app.tracking.models import TrackedRun
from tests.collectors import Collector, FakeMlflow, running
from tests.patience import PATIENCE
from tests.workers.conftest import JobHandle, MakeJob, Start, wait_for
from workers.__main__ import WORKER_FLAGS

Supervise = Callable[[JobHandle], subprocess.Popen[bytes]]
TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"


@pytest.fixture
def collector(monkeypatch: pytest.MonkeyPatch) -> Iterator[Collector]:
    with running(Collector()) as server:
        monkeypatch.setenv("SECATEUR_OTLP_ENDPOINT", server.url)
        yield server


@pytest.fixture
def mlflow(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeMlflow]:
    with running(FakeMlflow()) as server:
        monkeypatch.setenv("SECATEUR_MLFLOW_TRACKING_URI", server.url)
        monkeypatch.setattr(rest, "TIMEOUT", PATIENCE)
        get_settings.cache_clear()
        yield server


def attributes(span: Span) -> dict[str, object]:
    return {each.key: getattr(each.value, each.value.WhichOneof("value") or "") for each in span.attributes}


def report(session: Session) -> None:
    """Tell MLflow all that is due."""
    tracking.report_due(session, get_settings())


def test_an_attempt_is_a_span_of_its_request(make_job: MakeJob, supervise: Supervise, collector: Collector) -> None:
    job = make_job()
    job.sql(f"traceparent = '00-{TRACE}-{PARENT}-01'")
    supervise(job).wait(PATIENCE)
    assert job.row.state == "succeeded" and collector.services == {"secateur-worker"}
    [attempt] = collector.named("attempt")
    assert (attempt.trace_id.hex(), attempt.parent_span_id.hex()) == (TRACE, PARENT)
    assert attributes(attempt) == {
        "secateur.job.id": str(job.id),
        "secateur.job.attempt": 1,
        "secateur.job.model_id": "local:any",
        "secateur.job.method": "random",
        "secateur.job.target_ratio": 0.2,
        "secateur.attempt.outcome": "succeeded",
    }
    assert attempt.status.code == Status.STATUS_CODE_UNSET
    stages = [span for span in collector.spans if span != attempt]
    assert {span.parent_span_id for span in stages} == {attempt.span_id}
    scored = [attributes(span)["secateur.step"] for span in collector.named("scoring")]
    assert scored == [0, 1, 2, 3] and collector.named("publishing")
    ends = [(span.start_time_unix_nano, span.end_time_unix_nano) for span in stages]
    assert all(end <= start for (_, end), (start, _) in pairwise(ends)), "stages follow each other"


def test_a_span_names_the_error(make_job: MakeJob, supervise: Supervise, collector: Collector) -> None:
    job = make_job({"error_in_round": 2})
    supervise(job).wait(PATIENCE)
    [attempt] = collector.named("attempt")
    told = attributes(attempt)
    assert (told["secateur.attempt.outcome"], told["error.type"]) == ("failed", "weights_not_finite")
    assert attempt.status.code == Status.STATUS_CODE_ERROR and not attempt.parent_span_id


def test_a_worker_of_celery_sends_its_last_spans(
    make_job: MakeJob, start: Start, session: Session, collector: Collector
) -> None:
    worker = start("celery", "-A", "tests.workers.celery_standin", "worker", *WORKER_FLAGS)
    wait_for(lambda: fleet.live(session, 3600))
    job = make_job({"hang_in_round": 1})
    dispatch.wake_worker()
    job.wait_for_round(0)
    worker.terminate()
    assert worker.wait(PATIENCE) == 0
    [attempt] = collector.named("attempt")
    assert attributes(attempt)["secateur.attempt.outcome"] == "released"


@pytest.mark.parametrize("how", ["silent", "absent", "broken"])
def test_a_job_needs_no_collector(
    how: str, make_job: MakeJob, supervise: Supervise, collector: Collector, monkeypatch: pytest.MonkeyPatch
) -> None:
    if how == "silent":
        collector.speaks.clear()
    if how == "broken":
        collector.status = 503
    if how == "absent":
        monkeypatch.setenv("SECATEUR_OTLP_ENDPOINT", "http://127.0.0.1:1")
    job = make_job()
    worker = supervise(job)
    job.wait_for_state("succeeded")
    assert worker.wait(PATIENCE) == 0


def test_a_job_is_a_run(make_job: MakeJob, supervise: Supervise, mlflow: FakeMlflow, session: Session) -> None:
    job = make_job(recovery={"layerwise": {"kind": "bias", "fit_to": None}}, components=["a", "b"], note="x" * 9000)
    job.sql("""labels = '{"team": "nlp"}'""")
    supervise(job).wait(PATIENCE)
    report(session)
    [run] = mlflow.runs.values()
    assert run["experiment"] == mlflow.experiments["secateur"] and run["name"] == "local:any random"
    assert run["tags"] == {
        "secateur.job_id": str(job.id),
        "secateur.key": "test",
        "secateur.model_id": "local:any",
        "secateur.label.team": "nlp",
        "secateur.state": "succeeded",
        "secateur.attempt": "1",
        "secateur.error": "",
    }
    finished_at = job.row.finished_at
    assert finished_at is not None
    assert (run["status"], run["end_time"]) == ("FINISHED", int(finished_at.timestamp() * 1000))
    params = run["params"]
    assert len(params.pop("note").encode()) <= 5000
    assert params == {
        "model_id": "local:any",
        "target_ratio": "0.2",
        "method": "random",
        "rounds": "3",
        "recovery.layerwise.kind": "bias",
        "components": '["a", "b"]',
    }
    perplexity = {each["step"]: each["value"] for each in run["metrics"] if each["key"] == "perplexity"}
    assert perplexity == {0: 10.0, 1: 11.0, 2: 12.0, 3: 13.0}
    assert {each["key"] for each in run["metrics"]} == {"attempt", "perplexity", "loss"}
    asked = len(mlflow.asked)
    report(session)
    assert len(mlflow.asked) == asked, "nothing is new"


def test_a_run_goes_on_with_its_job(
    make_job: MakeJob, supervise: Supervise, mlflow: FakeMlflow, session: Session
) -> None:
    """Attempts, a lost worker and a cancellation: one run, whose figures come once."""
    job = make_job({"kill_in_round": 2})
    supervise(job).wait(PATIENCE)
    assert job.row.state == "queued"
    report(session)
    [run] = mlflow.runs.values()
    assert run["status"] == "SCHEDULED"
    job.sql("not_before = NULL")
    supervise(job).wait(PATIENCE)
    report(session)
    assert run["status"] == "FINISHED" and run["tags"]["secateur.attempt"] == "2" and len(mlflow.runs) == 1
    assert [each["step"] for each in run["metrics"] if each["key"] == "perplexity"] == [0, 1, 2, 3]
    other = make_job()
    transitions.apply(session, other.row, Trigger.CANCEL)
    session.commit()
    report(session)
    assert [each["status"] for each in mlflow.runs.values()] == ["FINISHED", "KILLED"]


@pytest.mark.parametrize("how", ["silent", "absent", "broken"])
def test_what_happens_while_mlflow_is_away_is_told_later(
    how: str,
    make_job: MakeJob,
    supervise: Supervise,
    mlflow: FakeMlflow,
    session: Session,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if how == "silent":
        mlflow.speaks.clear()
        monkeypatch.setattr(rest, "TIMEOUT", 0.1)
    if how == "broken":
        mlflow.status = 503
    if how == "absent":
        monkeypatch.setenv("SECATEUR_MLFLOW_TRACKING_URI", "http://127.0.0.1:1")
        get_settings.cache_clear()
    monkeypatch.setattr(tracking, "HOLD", 0.0)
    job = make_job()
    supervise(job).wait(PATIENCE)
    assert job.row.state == "succeeded"
    with pytest.raises(MlflowUnavailable):
        report(session)
    mlflow.speaks.set()
    mlflow.status = 200
    monkeypatch.setattr(rest, "TIMEOUT", PATIENCE)
    monkeypatch.setenv("SECATEUR_MLFLOW_TRACKING_URI", mlflow.url)
    get_settings.cache_clear()
    report(session)
    [run] = mlflow.runs.values()
    assert run["status"] == "FINISHED" and len(run["metrics"]) == 12


def test_a_refusal_is_logged_once(
    make_job: MakeJob,
    supervise: Supervise,
    mlflow: FakeMlflow,
    session: Session,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(rest, "LONGEST_VALUE", 10_000)
    jobs = [make_job(note="x" * 9000), make_job()]
    for job in jobs:
        supervise(job).wait(PATIENCE)
    report(session)
    report(session)
    assert caplog.text.count("MLflow refuses what it is told") == 1 and str(jobs[0].id) in caplog.text
    assert [run["status"] for run in mlflow.runs.values()] == ["RUNNING", "FINISHED"]
    assert session.scalars(select(TrackedRun.due_at)).all() == [None, None]


def test_what_happens_during_a_report_is_told_next(
    make_job: MakeJob, mlflow: FakeMlflow, session: Session, settings: Settings
) -> None:
    job = make_job()
    leases.claim(session, job.id, "test", 600)
    update = mlflow.runs_update

    def and_fail(given: dict[str, object]) -> tuple[int, dict[str, object]]:
        mlflow.runs_update = update  # type: ignore[method-assign]
        leases.release(session, job.id, 1)
        return update(given)

    mlflow.runs_update = and_fail  # type: ignore[method-assign]
    report(session)
    report(session)
    [run] = mlflow.runs.values()
    assert run["status"] == "SCHEDULED"


def test_the_scheduler_reports(make_job: MakeJob, supervise: Supervise, start: Start, mlflow: FakeMlflow) -> None:
    scheduler = start("workers", "scheduler")
    job = make_job()
    supervise(job).wait(PATIENCE)
    wait_for(lambda: [run["status"] for run in mlflow.runs.values()] == ["FINISHED"])
    scheduler.terminate()
    assert scheduler.wait(PATIENCE) == 0


def test_nothing_is_imported_or_kept_when_off(make_job: MakeJob, supervise: Supervise, session: Session) -> None:
    job = make_job()
    supervise(job).wait(PATIENCE)
    assert job.row.state == "succeeded" and session.scalars(select(TrackedRun)).all() == []
