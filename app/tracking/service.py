"""The jobs as runs of MLflow: the request as parameters, the figures of the steps as metrics, the state as status.

Events of a job make its run due in the database, and the scheduler reports due runs. So neither a request nor a worker
waits for MLflow, and what happens while MLflow is away is reported when it is back.
"""

import datetime as dt
import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from itertools import chain, islice
from typing import Any

from sqlalchemy.orm import Session

from app.config import Settings
from app.jobs.models import Job, JobEvent
from app.tracking import repository
from app.tracking.mlflow import Mlflow, MlflowRefused
from app.tracking.models import TrackedRun
from secateur.contract.jobs import StepMetrics
from secateur.contract.states import State

log = logging.getLogger(__name__)

EXPERIMENT = "secateur"
BATCH = 32
HOLD = 120.0
"""Seconds after which a run that could not be reported is due again."""
JOB_ID = "secateur.job_id"
STATUSES = {
    State.QUEUED: "SCHEDULED",
    State.PAUSED: "SCHEDULED",
    State.RUNNING: "RUNNING",
    State.PUBLISHING: "RUNNING",
    State.CANCELLING: "RUNNING",
    State.SUCCEEDED: "FINISHED",
    State.FAILED: "FAILED",
    State.CANCELLED: "KILLED",
}
NO_FIGURES = {"step", "kind", "completed_at"}
"""Fields of a step's metrics that are no numbers, or that MLflow has in another place."""


def report_due(session: Session, settings: Settings) -> None:
    """Report one batch of due runs, one after the other.

    What MLflow refuses is logged, and tried again at the next event of the job.

    Raises:
        MlflowUnavailable: the server does not answer. The runs that were not reported stay due.
    """
    if settings.mlflow_tracking_uri is None:
        return
    due = iter(lambda: repository.claim_due(session, HOLD), None)
    first = next(due, None)
    if first is None:  # most of the time; a client loads certificates when it is made
        return
    with Mlflow(settings.mlflow_tracking_uri) as mlflow:
        for run in islice(chain([first], due), BATCH):
            if found := repository.read(session, run):
                try:
                    known = _report(mlflow, run, *found)
                except MlflowRefused as refused:
                    log.warning("MLflow refuses what it is told of job %s: %s", run.job_id, refused)
                    known = {}
                repository.told(session, run, known)


def _report(mlflow: Mlflow, run: TrackedRun, job: Job, key: str, events: Sequence[JobEvent]) -> dict[str, Any]:
    """Tell MLflow what is new of the job, and return the columns of the run that say what MLflow knows."""
    run_id = run.run_id or _begin(mlflow, job, key)
    mlflow.log(run_id, {}, _state(job), [metric for event in events for metric in _metrics(event)])
    ended = None if job.finished_at is None else _milliseconds(job.finished_at)
    mlflow.update_run(run_id, STATUSES[State(job.state)], ended)
    return {"run_id": run_id, "last_event": events[-1].id if events else run.last_event}


def _begin(mlflow: Mlflow, job: Job, key: str) -> str:
    """Return the id of the job's run, which is created with its parameters unless an earlier try has created it."""
    experiment = mlflow.experiment(EXPERIMENT)
    run_id = mlflow.find_run(experiment, JOB_ID, str(job.id))
    if run_id is None:
        tags = {JOB_ID: str(job.id), "secateur.key": key, "secateur.model_id": job.model_id}
        run_id = mlflow.create_run(experiment, f"{job.model_id} {job.method}", _milliseconds(job.created_at), tags)
    labels = {f"secateur.label.{name}": value for name, value in job.labels.items()}
    mlflow.log(run_id, dict(_flat(job.request)), labels, [])
    return run_id


def _state(job: Job) -> dict[str, str]:
    """Return the tags that change in the life of a job."""
    return {
        "secateur.state": job.state,
        "secateur.attempt": str(job.attempt),
        "secateur.error": job.error["code"] if job.error else "",
    }


def _flat(values: Mapping[str, Any], before: str = "") -> Iterator[tuple[str, str]]:
    """Yield the values of a request by their dotted names, such as ``recovery.layerwise.kind``; lists are JSON."""
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{before}{name}.")
        elif value is not None:
            yield f"{before}{name}", value if isinstance(value, str) else json.dumps(value)


def _metrics(event: JobEvent) -> Sequence[dict[str, Any]]:
    """Return the figures of the step that the event completed, as ``GET /v1/jobs/{id}/metrics`` names them."""
    if event.type != "step":
        return []
    step = StepMetrics.of_step(event.data["number"], event.attempt, event.created_at, event.data)
    figures = step.model_dump(exclude=NO_FIGURES, exclude_none=True)
    place = {"timestamp": _milliseconds(event.created_at), "step": step.step}
    return [{"key": name, "value": value, **place} for name, value in figures.items()]


def _milliseconds(time: dt.datetime) -> int:
    return int(time.timestamp() * 1000)
