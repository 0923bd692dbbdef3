"""Ownership of a job: claim, renew, release, reap. Every write a worker makes is fenced by its ``attempt``.

All times are the database's clock, so that a worker whose clock jumps cannot keep or steal a lease.
"""

import datetime as dt
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import func, select, text, true
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.orm import Session

from app.auth import repository as keys
from app.jobs import transitions
from app.jobs.models import Job, JobStep
from app.jobs.transitions import Trigger
from secateur.contract.errors import ErrorCode, PruningError
from secateur.contract.states import State

LIVE = (State.RUNNING, State.PUBLISHING, State.CANCELLING)


class LeaseLost(Exception):
    """Another attempt owns the job now, or the lease ran out: stop working and write nothing more."""


@dataclass(frozen=True)
class Claim:
    """What a worker needs to know of the job it owns."""

    job_id: uuid.UUID
    attempt: int
    request: dict[str, Any]
    request_id: str | None = None
    """Of the HTTP request that made the job."""


@dataclass(frozen=True)
class Beat:
    """The answer to a heartbeat, and to a report: what the owner of the job was asked meanwhile."""

    cancel: bool
    pause: bool


def _in(seconds: float) -> Any:
    return func.now() + dt.timedelta(seconds=seconds)


def claim(session: Session, job_id: uuid.UUID, worker: str, ttl: float, most: int | None = None) -> Claim | None:
    """Take a queued job; ``None`` when there is nothing to take (done, taken, deleted, or not due yet).

    Nor is there when workers own ``most`` jobs of its API key already; :func:`due` finds it when they do not.
    """
    query = select(Job).where(Job.id == job_id, Job.state == State.QUEUED).with_for_update(skip_locked=True)
    job = session.scalars(query.where((Job.not_before.is_(None)) | (Job.not_before <= func.now()))).one_or_none()
    if job is None:
        return None
    if most is not None:
        keys.lock(session, job.owner_id)  # or two workers might count at the same time
        if _owned_count(session, job.owner_id) >= most:
            job.dispatched_at = None
            session.commit()
            return None
    job.attempt += 1
    transitions.apply(
        session,
        job,
        Trigger.CLAIM,
        worker=worker,
        lease_expires_at=_in(ttl),
        not_before=None,
        started_at=job.started_at or dt.datetime.now(dt.UTC),
    )
    session.commit()
    return Claim(job.id, job.attempt, job.request, job.request_id)


def _owned_count(session: Session, owner_id: uuid.UUID) -> int:
    return session.scalar(select(func.count()).where(Job.owner_id == owner_id, Job.state.in_(LIVE))) or 0


def owned(session: Session, job_id: uuid.UUID, attempt: int) -> Job:
    """The job's row, locked, if ``attempt`` still owns it and its lease is live.

    Raises:
        LeaseLost: it does not.
    """
    query = select(Job).where(
        Job.id == job_id, Job.attempt == attempt, Job.state.in_(LIVE), Job.lease_expires_at > func.clock_timestamp()
    )
    job = session.scalars(query.with_for_update(), execution_options={"populate_existing": True}).one_or_none()
    if job is None:
        raise LeaseLost(f"attempt {attempt} no longer owns job {job_id}")
    return job


def renew(session: Session, job_id: uuid.UUID, attempt: int, ttl: float) -> Beat:
    """Heartbeat: extend the lease by ``ttl`` seconds from now.

    Raises:
        LeaseLost: see :func:`owned`.
    """
    job = owned(session, job_id, attempt)
    job.lease_expires_at = _in(ttl)
    return _commit(session, job)


def _commit(session: Session, job: Job) -> Beat:
    beat = Beat(cancel=job.state == State.CANCELLING, pause=job.pause_requested)
    session.commit()
    return beat


def report_progress(
    session: Session, job_id: uuid.UUID, attempt: int, progress: dict[str, Any], event: dict[str, Any] | None = None
) -> Beat:
    """Fenced: show ``progress`` on the job and, with ``event`` {type, data}, append to what happened."""
    job = owned(session, job_id, attempt)
    job.progress = progress
    job.version += 1
    if event is not None:
        transitions.record_event(session, job, event["type"], event["data"])
    else:
        transitions.wake(session, job)
    return _commit(session, job)


def record_step(
    session: Session, job_id: uuid.UUID, attempt: int, number: int, path: str, sha256: str, data: dict[str, Any]
) -> Beat:
    """Fenced: the step is complete and its checkpoint is on disk. From this row, and no listing, a later attempt resumes.

    A step clears the count of failures: ``max_failures`` is for attempts that get nowhere. Recording a step
    twice (the answer to the first was lost) changes nothing.
    """
    job = owned(session, job_id, attempt)
    known = session.get(JobStep, (job_id, number))
    if known is not None and (known.attempt, known.sha256) == (attempt, sha256):
        return _commit(session, job)
    row = {"attempt": attempt, "path": path, "sha256": sha256, "data": data}
    session.execute(
        insert(JobStep)
        .values(job_id=job_id, number=number, **row)
        .on_conflict_do_update(index_elements=["job_id", "number"], set_=row)
    )
    job.version += 1
    job.failures = 0 if number else job.failures
    transitions.record_event(session, job, "step", {"number": number, **data})
    return _commit(session, job)


def move(session: Session, job_id: uuid.UUID, attempt: int, trigger: Trigger, **values: Any) -> State:
    """Fenced state change by the job's owner; returns the new state.

    Raises:
        LeaseLost: see :func:`owned`.
        TransitionRefused: the table has no such move (a job that is being cancelled cannot start publishing).
    """
    job = transitions.apply(session, owned(session, job_id, attempt), trigger, **values)
    state = State(job.state)
    session.commit()
    return state


def release(session: Session, job_id: uuid.UUID, attempt: int) -> State:
    """Fenced: give the job back without counting a failure: shutdown, deploy, or a pause at a step's end."""
    return move(session, job_id, attempt, Trigger.REQUEUE)


def fail(
    session: Session, job_id: uuid.UUID, attempt: int, error: dict[str, Any], max_failures: int, backoff: float
) -> State:
    """Fenced: the attempt failed with ``error`` {code, message, retryable}; requeue while that may help, else fail the job."""
    state = _fail(session, owned(session, job_id, attempt), error, max_failures, backoff)
    session.commit()
    return state


def _fail(session: Session, job: Job, error: dict[str, Any], max_failures: int, backoff: float) -> State:
    failures = job.failures + 1
    if job.state != State.CANCELLING and error["retryable"] and failures < max_failures:
        wait = _in(backoff * 2 ** (failures - 1))
        transitions.apply(session, job, Trigger.REQUEUE, failures=failures, not_before=wait)
        transitions.record_event(session, job, "retry", {"error": error, "failures": failures})
    elif job.state == State.CANCELLING:
        transitions.apply(session, job, Trigger.FAIL)
    else:
        transitions.apply(session, job, Trigger.FAIL, failures=failures, error=error)
    return State(job.state)


def owned_ids(session: Session) -> Sequence[uuid.UUID]:
    """The jobs that a worker owns, or did until its lease ran out a moment ago."""
    return session.scalars(select(Job.id).where(Job.state.in_(LIVE))).all()


def reap(session: Session, max_failures: int, backoff: float, limit: int = 100) -> list[uuid.UUID]:
    """Requeue (or, at ``max_failures``, fail) the jobs whose lease ran out; returns their ids. Any number of callers."""
    query = (
        select(Job)
        .where(Job.state.in_(LIVE), Job.lease_expires_at <= func.now())
        .order_by(Job.lease_expires_at)
        .limit(limit)
        .with_for_update(skip_locked=True)
    )
    error = PruningError(ErrorCode.WORKER_LOST, "The worker that ran this job stopped answering.").as_dict()
    reaped = []
    for job in session.scalars(query).all():
        if job.state == State.CANCELLING:
            transitions.apply(session, job, Trigger.REQUEUE)
        else:
            _fail(session, job, error, max_failures, backoff)
        reaped.append(job.id)
    session.commit()
    return reaped


def due(session: Session, redispatch_after: float, limit: int = 100, most: int | None = None) -> list[uuid.UUID]:
    """Mark and return queued jobs whose doorbell never rang, or rang too long ago (``FOR UPDATE SKIP LOCKED``).

    None of an API key of which workers own ``most`` jobs already.
    """
    owners = select(Job.owner_id).where(Job.state.in_(LIVE)).group_by(Job.owner_id)
    stale = func.now() - text(f"interval '{float(redispatch_after)} seconds'")
    query = (
        select(Job)
        .where(
            Job.state == State.QUEUED,
            (Job.not_before.is_(None)) | (Job.not_before <= func.now()),
            (Job.dispatched_at.is_(None)) | (Job.dispatched_at <= stale),
            true() if most is None else Job.owner_id.not_in(owners.having(func.count() >= most)),
        )
        .order_by(Job.id)
        .limit(limit)
        .with_for_update(skip_locked=True)
    )
    jobs = session.scalars(query).all()
    for job in jobs:
        job.dispatched_at = func.now()
    session.commit()
    return [job.id for job in jobs]
