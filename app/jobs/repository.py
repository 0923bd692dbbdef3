"""Queries on jobs for the API and the metrics; workers use :mod:`app.jobs.leases`."""

import datetime as dt
import uuid
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from sqlalchemy import Float, Row, bindparam, cast, func, or_, select
from sqlalchemy.orm import Session, defer

from app.auth.models import ApiKey
from app.auth.repository import FIND
from app.jobs.models import Job, JobEvent, JobStep
from app.jobs.transitions import lock, record_event
from secateur.contract.states import TERMINAL, State

# These statements are built once: pollers use them often, and building one takes longer than the database's answer.
COLUMNS = (
    Job.id, Job.state, Job.version, Job.model_id, Job.method, Job.labels, Job.attempt, Job.failures, Job.pause_requested,
    Job.progress, Job.error, Job.result, Job.created_at, Job.started_at, Job.finished_at, Job.request,
)  # fmt: skip
VIEW = select(*COLUMNS).where(Job.id == bindparam("job_id"), Job.owner_id == bindparam("owner_id"))
VIEW_WITH_KEY = FIND.add_columns(*COLUMNS).outerjoin(Job, (Job.id == bindparam("job_id")) & (Job.owner_id == ApiKey.id))
"""One query that finds the API key and the job; the most frequent request uses it in place of two queries."""
FINISHED_WITHIN = dt.timedelta(hours=1)


class QueueNumbers(NamedTuple):
    """The number of jobs by state and the age in seconds of the oldest queued job.

    Ended jobs are counted only if they ended within the last hour.
    """

    by_state: Mapping[str, int]
    oldest_seconds: float


def add(session: Session, job: Job) -> None:
    """Insert the job with its first event; the caller commits."""
    session.add(job)
    session.flush()
    record_event(session, job, "state", {"from": None, "to": job.state, "trigger": "create", "error": None})


def get(session: Session, owner_id: uuid.UUID, job_id: uuid.UUID, *, locked: bool = False) -> Job | None:
    """Return the owner's job, or ``None``; with ``locked``, its row is locked until the transaction ends.

    Without ``locked``, the report is read from the database only when it is accessed.
    """
    job = lock(session, job_id) if locked else session.get(Job, job_id, options=[defer(Job.report)])
    return job if job is not None and job.owner_id == owner_id else None


def view(session: Session, owner_id: uuid.UUID, job_id: uuid.UUID) -> Row[Any] | None:
    """Return the public columns of the owner's job as plain values, or ``None``."""
    return session.execute(VIEW, {"job_id": job_id, "owner_id": owner_id}).one_or_none()


def open_count(session: Session, owner_id: uuid.UUID) -> int:
    """Return the number of the owner's jobs that have not ended."""
    return session.scalar(select(func.count()).where(Job.owner_id == owner_id, Job.state.not_in(TERMINAL))) or 0


def ended_before(session: Session, seconds: float, among: Sequence[uuid.UUID]) -> Sequence[uuid.UUID]:
    """Return the ids of those jobs in ``among`` that ended more than ``seconds`` ago."""
    since = func.now() - dt.timedelta(seconds=seconds)
    ended = Job.state.in_(TERMINAL), Job.finished_at < since
    return session.scalars(select(Job.id).where(Job.id == func.any(list(among)), *ended)).all()


def newest(
    session: Session,
    owner_id: uuid.UUID,
    *,
    states: Sequence[State],
    method: str | None,
    model_id: str | None,
    labels: Mapping[str, str],
    before: uuid.UUID | None,
    limit: int,
) -> Sequence[Job]:
    """Return up to ``limit`` of the owner's jobs that match the filters, newest first, without request and report.

    If ``before`` is given, the list starts with the newest job that was created before job ``before``.
    """
    columns = defer(Job.request, raiseload=True), defer(Job.report, raiseload=True)
    query = select(Job).options(*columns).where(Job.owner_id == owner_id).order_by(Job.id.desc()).limit(limit)
    if states:
        query = query.where(Job.state.in_(states))
    if method is not None:
        query = query.where(Job.method == method)
    if model_id is not None:
        query = query.where(Job.model_id == model_id)
    if labels:
        query = query.where(Job.labels.contains(dict(labels)))
    if before is not None:
        query = query.where(Job.id < before)
    return session.scalars(query).all()


def events(session: Session, job_id: uuid.UUID, after: int, limit: int) -> Sequence[JobEvent]:
    """Return up to ``limit`` events of the job with an id above ``after``, oldest first.

    The ids of a job's events follow the order of their commits, because writing an event needs the lock on the job's
    row. A later event therefore never has an id below one that was seen.
    """
    query = select(JobEvent).where(JobEvent.job_id == job_id, JobEvent.id > after)
    return session.scalars(query.order_by(JobEvent.id).limit(limit)).all()


def steps(session: Session, job_id: uuid.UUID) -> Sequence[JobStep]:
    """Return the job's completed steps, in order."""
    return session.scalars(select(JobStep).where(JobStep.job_id == job_id).order_by(JobStep.number)).all()


def queue_numbers(session: Session) -> QueueNumbers:
    """Return the numbers of the queue that the metrics show."""
    recent = or_(Job.finished_at.is_(None), Job.finished_at > func.now() - FINISHED_WITHIN)
    age = func.extract("epoch", func.now() - func.min(Job.created_at))
    rows = session.execute(select(Job.state, func.count(), age).where(recent).group_by(Job.state)).all()
    oldest = next((float(age) for state, _, age in rows if state == State.QUEUED), 0.0)
    return QueueNumbers({state: count for state, count, _ in rows}, oldest)


def running_by_worker(session: Session) -> dict[str, float]:
    """Return the number of jobs that each worker owns, by worker."""
    query = select(Job.worker, func.count()).where(Job.lease_expires_at.is_not(None)).group_by(Job.worker)
    return {str(worker): count for worker, count in session.execute(query)}


def recent_retries(session: Session) -> dict[str, float]:
    """Return the number of attempts of the last hour that failed and were queued again, by the error's code."""
    code = JobEvent.data["error"]["code"].astext
    since = JobEvent.created_at > func.now() - FINISHED_WITHIN
    query = select(code, func.count()).where(JobEvent.type == "retry", since).group_by(code)
    return {str(name): count for name, count in session.execute(query)}


def recent_steps(session: Session) -> dict[str, float]:
    """Return the mean duration in seconds of the steps of the last hour, by method; step 0 does not count."""
    seconds = func.avg(cast(JobStep.data["seconds"].astext, Float))
    since = JobStep.created_at > func.now() - FINISHED_WITHIN
    query = select(Job.method, seconds).join(Job, Job.id == JobStep.job_id).where(since, JobStep.number > 0)
    return {method: mean for method, mean in session.execute(query.group_by(Job.method)) if mean is not None}


def delete(session: Session, job: Job) -> None:
    """Delete the job and, by cascade, its events, steps and webhooks; the caller commits."""
    session.delete(job)
    session.flush()
