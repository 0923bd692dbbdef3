"""The table of a job's state transitions, and the only function that changes a job's state.

queued ──claim──▶ running ──publish──▶ publishing ──succeed──▶ succeeded
  │ ▲               │  │
  │ └───requeue─────┘  └──▶ paused / cancelling ▶ cancelled / failed
"""

import datetime as dt
import uuid
from enum import StrEnum
from typing import Any

from sqlalchemy import func, select
from sqlalchemy.orm import Session

from app.config import get_settings
from app.jobs import attempts, usage
from app.jobs.models import Job, JobEvent
from app.tracking import repository as tracking
from app.webhooks import repository as webhooks
from secateur.contract.states import TERMINAL, State

LIVE = (State.RUNNING, State.PUBLISHING, State.CANCELLING)
"""The states in which a worker owns the job."""


class Trigger(StrEnum):
    CLAIM = "claim"
    PAUSE = "pause"
    RESUME = "resume"
    CANCEL = "cancel"
    STOPPED = "stopped"
    RETRY = "retry"
    PUBLISH = "publish"
    SUCCEED = "succeed"
    REQUEUE = "requeue"
    FAIL = "fail"


# A missing pair is refused and changes nothing; a pair that maps a state to itself is idempotent.
TABLE: dict[tuple[State, Trigger], State] = {
    (State.QUEUED, Trigger.CLAIM): State.RUNNING,
    (State.QUEUED, Trigger.PAUSE): State.PAUSED,
    (State.RUNNING, Trigger.PAUSE): State.RUNNING,  # a pause request, which takes effect at the step's end
    (State.PAUSED, Trigger.PAUSE): State.PAUSED,
    (State.PAUSED, Trigger.RESUME): State.QUEUED,
    (State.QUEUED, Trigger.RESUME): State.QUEUED,
    (State.RUNNING, Trigger.RESUME): State.RUNNING,  # withdraws a pause request
    (State.QUEUED, Trigger.CANCEL): State.CANCELLED,
    (State.PAUSED, Trigger.CANCEL): State.CANCELLED,
    (State.RUNNING, Trigger.CANCEL): State.CANCELLING,
    (State.CANCELLING, Trigger.CANCEL): State.CANCELLING,
    (State.CANCELLED, Trigger.CANCEL): State.CANCELLED,
    (State.CANCELLING, Trigger.STOPPED): State.CANCELLED,
    (State.FAILED, Trigger.RETRY): State.QUEUED,
    (State.CANCELLED, Trigger.RETRY): State.QUEUED,
    (State.QUEUED, Trigger.RETRY): State.QUEUED,
    (State.RUNNING, Trigger.RETRY): State.RUNNING,
    (State.RUNNING, Trigger.PUBLISH): State.PUBLISHING,
    (State.PUBLISHING, Trigger.SUCCEED): State.SUCCEEDED,
    (State.RUNNING, Trigger.REQUEUE): State.QUEUED,
    (State.PUBLISHING, Trigger.REQUEUE): State.QUEUED,
    (State.CANCELLING, Trigger.REQUEUE): State.CANCELLED,  # the worker is lost, so nothing is left to stop
    (State.RUNNING, Trigger.FAIL): State.FAILED,
    (State.PUBLISHING, Trigger.FAIL): State.FAILED,
    (State.CANCELLING, Trigger.FAIL): State.CANCELLED,
}


class TransitionRefused(Exception):
    """The job's current state does not allow the trigger."""

    def __init__(self, state: State, trigger: Trigger, reason: str = "") -> None:
        super().__init__(f"a job that is {state} cannot take '{trigger}'{reason}")
        self.state = state
        self.trigger = trigger


def record_event(session: Session, job: Job, type: str, data: dict[str, Any]) -> None:
    """Append an event to the job, wake the waiters of the job, and let MLflow be told if the service tracks its jobs."""
    session.add(JobEvent(job_id=job.id, attempt=job.attempt, type=type, data=data))
    if get_settings().mlflow_tracking_uri is not None:
        tracking.owe(session, job.id)
    wake(session, job)


def wake(session: Session, job: Job) -> None:
    """Notify the waiters of the job that it changed (``NOTIFY secateur_jobs``, delivered at commit)."""
    session.execute(select(func.pg_notify("secateur_jobs", str(job.id))))


def apply(session: Session, job: Job, trigger: Trigger, *, reason: dict[str, Any] | None = None, **values: Any) -> Job:
    """Apply ``trigger`` to the row-locked ``job`` by the table and set ``values``; the caller commits.

    A job for which a pause was requested is paused instead of requeued. A job that began to publish can only be
    completed. A claim opens the row of the attempt, and the transition that takes the job from its worker closes the
    row; ``reason`` is the error {code, …} that ended the attempt.

    Raises:
        TransitionRefused: the table has no such pair, or the job may already be published and the trigger is cancel or
            pause; nothing was changed.
    """
    before = State(job.state)
    after = TABLE.get((before, trigger))
    if after is None:
        raise TransitionRefused(before, trigger)
    if job.may_be_published and trigger in (Trigger.CANCEL, Trigger.PAUSE):
        raise TransitionRefused(before, trigger, ": its model may be published already, so it can only be completed")
    if trigger is Trigger.REQUEUE and job.pause_requested:
        after = State.PAUSED
    requested = trigger is Trigger.PAUSE and after is State.RUNNING
    if trigger is Trigger.RETRY and after is State.RUNNING:
        requested = job.pause_requested
    if after is before and job.pause_requested == requested and not values:
        return job
    if before in LIVE and after not in LIVE:
        usage.count(session, job.owner_id, worker_seconds=usage.attempt_seconds(job))
    if after is State.SUCCEEDED:
        usage.count(session, job.owner_id, jobs_succeeded=1)
    if after is State.FAILED:
        usage.count(session, job.owner_id, jobs_failed=1)
    now = dt.datetime.now(dt.UTC)
    job.state = after
    job.pause_requested = requested
    job.may_be_published = job.may_be_published or trigger is Trigger.PUBLISH
    job.version += 1
    if after is not before:
        job.expires_at = None
        if after in TERMINAL:
            job.finished_at = now
            job.expires_at = _expiry(job, now)
        if after is State.SUCCEEDED:
            job.hub_token = None
        if after is State.QUEUED:
            job.finished_at = job.error = None
        if trigger is Trigger.CLAIM:
            job.claimed_at = func.now()
        job.last_error = None
        if before in LIVE and after not in LIVE:
            attempts.close(session, job, after, reason)
            job.lease_expires_at = job.worker = None
    for name, value in values.items():
        setattr(job, name, value)
    if trigger is Trigger.CLAIM:
        attempts.begin(session, job)
    record_event(session, job, "state", {"from": before, "to": after, "trigger": trigger, "error": job.error})
    if after is not before and after in TERMINAL:
        webhooks.owe(session, job)
    return job


def _expiry(job: Job, now: dt.datetime) -> dt.datetime | None:
    """Return the time at which the files of a job that ends now are deleted; ``None`` if they stay.

    The only copy of a pruned model stays: artifacts that are not published are kept until the job is deleted.
    """
    settings = get_settings()
    if job.state == State.SUCCEEDED:
        published = job.request.get("publish") is not None
        return now + dt.timedelta(seconds=settings.artifact_retention) if published else None
    return None if job.exported_at else now + dt.timedelta(seconds=settings.checkpoint_retention)


def lock(session: Session, job_id: uuid.UUID) -> Job | None:
    """Return the job's row, locked until the transaction ends (``SELECT … FOR UPDATE``), or ``None``."""
    return session.get(Job, job_id, with_for_update=True, populate_existing=True)
