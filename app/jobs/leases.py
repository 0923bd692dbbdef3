"""Leases: claim, renew, release and reap jobs. Every write of a worker is fenced by its ``attempt``.

The database's clock sets all times, so that a worker whose clock jumps can neither keep nor steal a lease.
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
from app.jobs import texts, transitions
from app.jobs.models import Job, JobStep
from app.jobs.transitions import Trigger
from secateur.contract.errors import ErrorCode, PruningError
from secateur.contract.states import State

LIVE = (State.RUNNING, State.PUBLISHING, State.CANCELLING)


class LeaseLost(Exception):
    """The attempt no longer owns the job, or its lease ran out; its worker must stop and write nothing more."""


@dataclass(frozen=True)
class Claim:
    """The data that a worker needs about the job that it owns."""

    job_id: uuid.UUID
    attempt: int
    request: dict[str, Any]
    request_id: str | None = None
    """Id of the HTTP request that created the job."""


@dataclass(frozen=True)
class Beat:
    """The answer to a heartbeat or a report: whether a user requested cancelling or pausing the job meanwhile."""

    cancel: bool
    pause: bool


def _in(seconds: float) -> Any:
    return func.now() + dt.timedelta(seconds=seconds)


def claim(session: Session, job_id: uuid.UUID, worker: str, ttl: float, most: int | None = None) -> Claim | None:
    """Claim a queued job for ``worker`` with a lease of ``ttl`` seconds, and return the claim.

    Return ``None`` when the job cannot be claimed because it has ended, is owned, was deleted or is not yet due. Also
    return ``None`` when workers already own ``most`` jobs of the job's API key; :func:`due` returns the job as soon as
    they own fewer.
    """
    query = select(Job).where(Job.id == job_id, Job.state == State.QUEUED).with_for_update(skip_locked=True)
    job = session.scalars(query.where((Job.not_before.is_(None)) | (Job.not_before <= func.now()))).one_or_none()
    if job is None:
        return None
    if most is not None:
        keys.lock(session, job.owner_id)  # otherwise two workers might count at the same time
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
    claimed = Claim(job.id, job.attempt, texts.whole_request(job), job.request_id)
    session.commit()
    return claimed


def _owned_count(session: Session, owner_id: uuid.UUID) -> int:
    return session.scalar(select(func.count()).where(Job.owner_id == owner_id, Job.state.in_(LIVE))) or 0


def owned(session: Session, job_id: uuid.UUID, attempt: int) -> Job:
    """Return the job's row, locked, if ``attempt`` still owns the job and its lease is live.

    Raises:
        LeaseLost: ``attempt`` no longer owns the job, or its lease ran out.
    """
    query = select(Job).where(
        Job.id == job_id, Job.attempt == attempt, Job.state.in_(LIVE), Job.lease_expires_at > func.clock_timestamp()
    )
    job = session.scalars(query.with_for_update(), execution_options={"populate_existing": True}).one_or_none()
    if job is None:
        raise LeaseLost(f"attempt {attempt} no longer owns job {job_id}")
    return job


def renew(session: Session, job_id: uuid.UUID, attempt: int, ttl: float) -> Beat:
    """Renew the lease: extend it to ``ttl`` seconds from now. This is the heartbeat of an attempt.

    Raises:
        LeaseLost: ``attempt`` no longer owns the job, or its lease ran out.
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
    """Store ``progress`` on the job and, if ``event`` {type, data} is given, append the event. This write is fenced.

    Raises:
        LeaseLost: ``attempt`` no longer owns the job, or its lease ran out.
    """
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
    """Record that a step is complete and its checkpoint is on disk. This write is fenced.

    A later attempt resumes from this row, not from a listing of files. A completed step (except step 0) resets the
    count of failures, because ``max_failures`` limits attempts that make no progress. Recording the same step twice,
    because the first answer was lost, changes nothing.

    Raises:
        LeaseLost: ``attempt`` no longer owns the job, or its lease ran out.
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
    """Apply ``trigger`` to the job for the attempt that owns it, and return the new state. This write is fenced.

    Raises:
        LeaseLost: ``attempt`` no longer owns the job, or its lease ran out.
        TransitionRefused: the transition table has no such transition; for example, a job that is being cancelled
            cannot start publishing.
    """
    job = transitions.apply(session, owned(session, job_id, attempt), trigger, **values)
    state = State(job.state)
    session.commit()
    return state


def release(session: Session, job_id: uuid.UUID, attempt: int) -> State:
    """Requeue the job without counting a failure, at a shutdown, a deploy or a pause at a step's end; fenced.

    Raises:
        LeaseLost: ``attempt`` no longer owns the job, or its lease ran out.
    """
    return move(session, job_id, attempt, Trigger.REQUEUE)


def fail(
    session: Session, job_id: uuid.UUID, attempt: int, error: dict[str, Any], max_failures: int, backoff: float
) -> State:
    """Record that the attempt failed with ``error`` {code, message, retryable}, and return the new state; fenced.

    Requeue the job if the error is retryable and the job has failed fewer than ``max_failures`` times; otherwise fail
    it. The wait before the next attempt is ``backoff`` seconds, doubled with every failure.

    Raises:
        LeaseLost: ``attempt`` no longer owns the job, or its lease ran out.
    """
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
    """Return the ids of the jobs that a worker owns, or owned until its lease ran out a moment ago."""
    return session.scalars(select(Job.id).where(Job.state.in_(LIVE))).all()


def reap(session: Session, max_failures: int, backoff: float, limit: int = 100) -> list[uuid.UUID]:
    """Requeue the jobs whose lease ran out, or fail them at ``max_failures``, and return their ids.

    Several callers may run this at the same time. At most ``limit`` jobs are reaped in one call.
    """
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
    """Mark and return the ids of queued jobs that were never dispatched, or were last dispatched too long ago.

    A dispatch is too old after ``redispatch_after`` seconds. The query locks with ``FOR UPDATE SKIP LOCKED``. Jobs of
    an API key of which workers already own ``most`` jobs are left out. At most ``limit`` jobs are returned.
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
