"""Queries on jobs for the API and the metrics; workers use :mod:`app.jobs.leases`."""

import datetime as dt
import uuid
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from sqlalchemy import (
    Boolean,
    Float,
    Row,
    bindparam,
    case,
    cast,
    false,
    func,
    insert,
    literal,
    not_,
    null,
    or_,
    select,
    tuple_,
    update,
)  # fmt: skip
from sqlalchemy import delete as delete_from
from sqlalchemy.orm import Session, defer

from app.auth.models import ApiKey
from app.auth.repository import FIND
from app.fleet.repository import Offer
from app.jobs import fair_queue, usage
from app.jobs.models import Job, JobEvent, JobLogLine, JobStep
from app.jobs.transitions import lock, record_event, wake
from secateur.contract.keys import Scope
from secateur.contract.states import TERMINAL, State

# These statements are built once: pollers use them often, and building one takes longer than the database's answer.
COLUMNS = (
    Job.id, Job.owner_id, Job.state, Job.version, Job.model_id, Job.method, Job.labels, Job.attempt, Job.failures,
    Job.pause_requested, Job.progress, Job.error, Job.last_error, Job.not_before, Job.result, Job.created_at,
    Job.started_at, Job.finished_at, Job.expires_at, Job.required_labels, Job.required_memory_bytes,
    Job.outgrown_memory_bytes, Job.derived_from, Job.request,
)  # fmt: skip
VIEW = select(*COLUMNS).where(
    Job.id == bindparam("job_id"), (Job.owner_id == bindparam("owner_id")) | bindparam("all_keys", type_=Boolean)
)
VIEW_WITH_KEY = FIND.add_columns(*COLUMNS).outerjoin(
    Job, (Job.id == bindparam("job_id")) & ((Job.owner_id == ApiKey.id) | ApiKey.scopes.contains([Scope.ADMIN]))
)
"""One query that finds the API key and the job; the most frequent request uses it in place of two queries."""
FINISHED_WITHIN = dt.timedelta(hours=1)
LOG_LINES = 1000
"""Largest number of lines that the log of a job keeps."""
LOG_BYTES = 256 * 2**10
"""Largest size of the lines that the log of a job keeps."""


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
    usage.count(session, job.owner_id, jobs_created=1)


def get(session: Session, owner_id: uuid.UUID | None, job_id: uuid.UUID, *, locked: bool = False) -> Job | None:
    """Return the owner's job, or ``None``; with ``locked``, its row is locked until the transaction ends.

    An ``owner_id`` of ``None`` finds the jobs of all owners.
    """
    job = lock(session, job_id) if locked else session.get(Job, job_id)
    return job if job is not None and owner_id in (None, job.owner_id) else None


def view(session: Session, owner_id: uuid.UUID | None, job_id: uuid.UUID) -> Row[Any] | None:
    """Return the public columns of the owner's job as plain values, or ``None``.

    An ``owner_id`` of ``None`` finds the jobs of all owners.
    """
    parameters = {"job_id": job_id, "owner_id": owner_id, "all_keys": owner_id is None}
    return session.execute(VIEW, parameters).one_or_none()


def open_count(session: Session, owner_id: uuid.UUID) -> int:
    """Return the number of the owner's jobs that have not ended."""
    return session.scalar(select(func.count()).where(Job.owner_id == owner_id, Job.state.not_in(TERMINAL))) or 0


def open_ids(session: Session, owner_id: uuid.UUID) -> Sequence[uuid.UUID]:
    """Return the ids of the owner's jobs that have not ended."""
    return session.scalars(select(Job.id).where(Job.owner_id == owner_id, Job.state.not_in(TERMINAL))).all()


def open_with_dataset(session: Session, owner_id: uuid.UUID, name: str, limit: int) -> Sequence[uuid.UUID]:
    """Return the ids of up to ``limit`` of the owner's jobs that have not ended and name the data set ``name``."""
    calibration, evaluation = Job.request["calibration"], Job.request["evaluation"]
    names = or_(
        calibration["dataset"].astext == name,
        evaluation["dataset"].astext == name,
        evaluation["perplexity"].contains([name]),
    )
    return session.scalars(
        select(Job.id).where(Job.owner_id == owner_id, Job.state.not_in(TERMINAL), names).order_by(Job.id).limit(limit)
    ).all()


def label(session: Session, job: Job, labels: Mapping[str, str]) -> None:
    """Replace the labels of the locked job; the caller commits."""
    job.labels = dict(labels)
    job.version += 1
    wake(session, job)


def with_expired_files(session: Session, limit: int) -> Sequence[Job]:
    """Return up to ``limit`` jobs whose files are kept no longer, locked until the transaction ends."""
    query = select(Job).where(Job.expires_at <= func.now(), ~Job.expired).order_by(Job.expires_at)
    return session.scalars(query.limit(limit).with_for_update(skip_locked=True)).all()


def forget_states(session: Session, job_ids: Sequence[uuid.UUID]) -> None:
    """Remove the states from which the jobs resume; the caller commits."""
    session.execute(update(JobStep).where(JobStep.job_id.in_(job_ids)).values(state=None))


def kept_steps(session: Session, job_id: uuid.UUID) -> set[int]:
    """Return the numbers of the job's steps that have a state."""
    return set(session.scalars(select(JobStep.number).where(JobStep.job_id == job_id, JobStep.state.is_not(None))))


def kept_bytes(session: Session, owner_id: uuid.UUID) -> int:
    """Return the number of bytes of the checkpoints of all jobs of an API key that keep their steps."""
    total = func.coalesce(func.sum(JobStep.kept_bytes), 0)
    query = select(total).join(Job, Job.id == JobStep.job_id)
    return int(session.scalar(query.where(Job.owner_id == owner_id, JobStep.state.is_not(None))) or 0)


def copy_steps(session: Session, source: uuid.UUID, numbers: Sequence[int], target: uuid.UUID) -> bool:
    """Copy steps of a job to another job, the last of ``numbers`` with its state; the caller commits.

    Return whether that state is there.
    """
    state = case((JobStep.number == numbers[-1], JobStep.state), else_=null())
    copied = (JobStep.number, JobStep.attempt, JobStep.data, JobStep.created_at)
    found = select(literal(target), *copied, state).where(JobStep.job_id == source, JobStep.number.in_(numbers))
    names = ["job_id", *(column.key for column in copied), "state"]
    session.execute(insert(JobStep).from_select(names, found))
    return numbers[-1] in kept_steps(session, target)


def newest(
    session: Session,
    owner_id: uuid.UUID | None,
    *,
    states: Sequence[State],
    method: str | None,
    model_id: str | None,
    labels: Mapping[str, str],
    before: uuid.UUID | None,
    limit: int,
) -> Sequence[Job]:
    """Return up to ``limit`` of the owner's jobs that match the filters, newest first, without request and report.

    An ``owner_id`` of ``None`` lists the jobs of all owners. If ``before`` is given, the list starts with the newest job that was created before job ``before``.
    """
    query = select(Job).options(defer(Job.request, raiseload=True)).order_by(Job.id.desc()).limit(limit)
    if owner_id is not None:
        query = query.where(Job.owner_id == owner_id)
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


def log(session: Session, job_id: uuid.UUID, after: tuple[int, int], limit: int) -> Sequence[JobLogLine]:
    """Return up to ``limit`` lines of the job's log after the line ``after`` (attempt, number), oldest first.

    Only the owner of the lease adds lines, so a later line never has a lower attempt or number than an earlier one.
    """
    place = tuple_(JobLogLine.attempt, JobLogLine.number)
    query = select(JobLogLine).where(JobLogLine.job_id == job_id, place > after)
    return session.scalars(query.order_by(JobLogLine.attempt, JobLogLine.number).limit(limit)).all()


def trim_log(session: Session, job_id: uuid.UUID) -> None:
    """Delete the oldest lines of the job's log beyond ``LOG_LINES`` lines or ``LOG_BYTES`` bytes; the caller commits."""
    newest_first = (JobLogLine.attempt.desc(), JobLogLine.number.desc())
    count = func.row_number().over(order_by=newest_first)
    size = func.sum(func.octet_length(JobLogLine.text)).over(order_by=newest_first)
    lines = select(JobLogLine.attempt, JobLogLine.number, count.label("count"), size.label("size"))
    counted = lines.where(JobLogLine.job_id == job_id).subquery()
    beyond = select(counted.c.attempt, counted.c.number).where(
        (counted.c.count > LOG_LINES) | (counted.c.size > LOG_BYTES)
    )
    place = tuple_(JobLogLine.attempt, JobLogLine.number)
    session.execute(
        delete_from(JobLogLine)
        .where(JobLogLine.job_id == job_id, place.in_(beyond))
        .execution_options(synchronize_session=False)
    )


def queue_numbers(session: Session) -> QueueNumbers:
    """Return the numbers of the queue that the metrics show."""
    recent = or_(Job.finished_at.is_(None), Job.finished_at > func.now() - FINISHED_WITHIN)
    age = func.extract("epoch", func.now() - func.min(Job.created_at))
    rows = session.execute(select(Job.state, func.count(), age).where(recent).group_by(Job.state)).all()
    oldest = next((float(age) for state, _, age in rows if state == State.QUEUED), 0.0)
    return QueueNumbers({state: count for state, count, _ in rows}, oldest)


def owned_by_worker(session: Session) -> dict[str, uuid.UUID]:
    """Return the job that each worker owns, by worker; a worker owns one job at most."""
    query = select(Job.worker, Job.id).where(Job.lease_expires_at.is_not(None))
    return {str(worker): job_id for worker, job_id in session.execute(query)}


def count_unheld(session: Session, offers: Sequence[Offer]) -> int:
    """Return the number of queued jobs that no worker with one of ``offers`` can hold."""
    distinct = [offer for index, offer in enumerate(offers) if offer not in offers[:index]]
    held = or_(false(), *(fair_queue.holds(offer) for offer in distinct))
    return session.scalar(select(func.count()).where(fair_queue.QUEUED, not_(held))) or 0


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
    """Delete the job and, by cascade, its events, log, steps and webhooks; the caller commits."""
    session.delete(job)
    session.flush()
