"""Leases: claim, renew, release and reap jobs. Every write of a worker is fenced by its ``attempt``.

The database's clock sets all times, so that a worker whose clock jumps can neither keep nor steal a lease.
"""

import datetime as dt
import json
import uuid
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

from sqlalchemy import func, select, update
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.orm import Session, undefer

from app.config import Settings
from app.fleet import repository as fleet
from app.jobs import checkpoints, fair_queue, repositories, repository, texts, transitions, usage
from app.jobs.models import Job, JobEvent, JobLogLine, JobStep
from app.jobs.naming import published_repo_ids
from app.jobs.routing import Required, gib
from app.jobs.transitions import LIVE, Trigger
from app.storage import repository as storage
from app.storage.service import artifacts_folder, tensors_folder
from secateur.contract.errors import ErrorCode, PruningError
from secateur.contract.states import State

UNWRITTEN = (ErrorCode.HUB_FORBIDDEN, ErrorCode.HUB_REFUSED)
"""Codes of the errors with which the Hub refuses to write a repository."""
WAITS_FOR_HUB = (ErrorCode.HUB_UNAVAILABLE, ErrorCode.STORAGE_UNAVAILABLE)
LONGEST_WAIT = 600.0
OWN_FAULTS = (ErrorCode.RUNNER_DIED, ErrorCode.RUNNER_STALLED, ErrorCode.INTERNAL_ERROR)
"""Errors whose cause is in the job's own processes; all other errors that are tried again come from outside."""


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
    exported: bool = False
    """Whether the pruned model is complete in the object store, so that only publishing remains."""
    traceparent: str | None = None
    """Span of that HTTP request (W3C Trace Context)."""


@dataclass(frozen=True)
class Patience:
    """The limits on further attempts at a job; durations are in seconds."""

    max_failures: int
    max_losses: int
    publish: float
    backoff: float
    """Wait before the second attempt; every further attempt doubles the wait, up to :data:`LONGEST_WAIT`."""
    worker_silence: float
    """Time without a heartbeat after which a worker counts as lost, so that no job moves to it."""

    @classmethod
    def of(cls, settings: Settings) -> Self:
        """Return the limits that the operator set."""
        return cls(
            settings.max_failures,
            settings.max_losses,
            settings.publish_patience,
            settings.retry_backoff,
            settings.worker_silence,
        )


@dataclass(frozen=True)
class LogLine:
    """A line for the log of a job; ``number`` counts the lines of an attempt from 1."""

    number: int
    written_at: dt.datetime
    text: str


@dataclass(frozen=True)
class Beat:
    """The answer to a heartbeat or a report: whether the job shall be cancelled, or stop at the end of its step."""

    cancel: bool
    pause: bool
    keep: bool = False
    """After the report of a step: whether the checkpoint of the step before stays."""


def _in(seconds: float) -> Any:
    return func.now() + dt.timedelta(seconds=seconds)


def claim_next(session: Session, worker: str, ttl: float, max_running: int | None) -> Claim | None:
    """Claim the next job in the fair order that ``worker`` may take, or return ``None`` if it may take none.

    ``max_running`` limits the jobs of one API key that workers own. A worker that sent no heartbeat yet, or that is
    drained, may take no job. Workers claim one after the other, so that each claim sees the claims before it.
    """
    fair_queue.lock(session)
    taker = fleet.get(session, worker)
    if taker is None or taker.drain is not None:
        session.rollback()
        return None
    passed: list[uuid.UUID] = []
    while (job_id := fair_queue.first(session, fleet.offer(taker), max_running, passed)) is not None:
        if found := claim(session, job_id, worker, ttl):
            return found
        passed.append(job_id)  # its owner changes it at this moment
    session.rollback()
    return None


def claim(session: Session, job_id: uuid.UUID, worker: str, ttl: float) -> Claim | None:
    """Claim a queued job for ``worker`` with a lease of ``ttl`` seconds, and return the claim.

    Return ``None`` when the job cannot be claimed because it has ended, is owned, was deleted, is locked by another
    transaction or is not yet due.
    """
    query = select(Job).where(Job.id == job_id, Job.state == State.QUEUED, fair_queue.IS_DUE)
    job = session.scalars(query.with_for_update(skip_locked=True)).one_or_none()
    if job is None:
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
    request, exported = texts.whole_request(job), job.exported_at is not None
    claimed = Claim(job.id, job.attempt, request, job.request_id, exported, job.traceparent)
    session.commit()
    return claimed


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


def renew(session: Session, job_id: uuid.UUID, attempt: int, ttl: float, lines: Sequence[LogLine] = ()) -> Beat:
    """Renew the lease: extend it to ``ttl`` seconds from now. This is the heartbeat of an attempt.

    ``lines`` are added to the job's log, of which the newest :data:`~app.jobs.repository.LOG_LINES` lines and
    :data:`~app.jobs.repository.LOG_BYTES` bytes are kept. Adding a line twice, because the first answer was lost,
    changes nothing.

    Raises:
        LeaseLost: ``attempt`` no longer owns the job, or its lease ran out.
    """
    job = owned(session, job_id, attempt)
    job.lease_expires_at = _in(ttl)
    if lines:
        rows = [{"job_id": job_id, "attempt": attempt, **vars(line)} for line in lines]
        session.execute(insert(JobLogLine).values(rows).on_conflict_do_nothing())
        repository.trim_log(session, job_id)
    return _commit(session, job)


def _commit(session: Session, job: Job, keep: bool = False) -> Beat:
    pause = job.pause_requested or fleet.must_release(session, job.worker)
    beat = Beat(cancel=job.state == State.CANCELLING, pause=pause, keep=keep)
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
    session: Session,
    job_id: uuid.UUID,
    attempt: int,
    number: int,
    data: dict[str, Any],
    state: dict[str, Any],
    stored_bytes: int = 0,
    quota: int | None = None,
) -> Beat:
    """Record that a step is complete, with the state from which a later attempt resumes. This write is fenced.

    A completed step (except step 0) resets the counts of failures and of lost workers, because ``max_failures`` and
    ``max_losses`` limit attempts that make no progress. Recording the same step twice, because the first answer was
    lost, changes nothing. The states of other steps are removed, except those that the job keeps: the step before stays
    while the files of the job's API key have at most ``quota`` bytes. ``stored_bytes`` is what the step added to the store.

    Raises:
        LeaseLost: ``attempt`` no longer owns the job, or its lease ran out.
    """
    job = owned(session, job_id, attempt)
    packed = zlib.compress(json.dumps(state).encode())
    known = session.get(JobStep, (job_id, number), options=[undefer(JobStep.state)])
    if known is not None and (known.attempt, known.state) == (attempt, packed):
        return _commit(session, job, number - 1 in repository.kept_steps(session, job_id))
    keeps = bool(job.request.get("keep_steps"))
    row = {"attempt": attempt, "data": data, "state": packed, "kept_bytes": stored_bytes + len(packed) if keeps else 0}
    session.execute(
        insert(JobStep)
        .values(job_id=job_id, number=number, **row)
        .on_conflict_do_update(index_elements=["job_id", "number"], set_=row)
    )
    kept = checkpoints.keep(session, job, number, quota) if keeps else set()
    others = update(JobStep).where(JobStep.job_id == job_id, JobStep.number.not_in({*kept, number}))
    session.execute(others.values(state=None))
    job.version += 1
    if number:
        job.failures = job.losses = 0
    transitions.record_event(session, job, "step", {"number": number, **data})
    return _commit(session, job, number - 1 in kept)


def newest_state(session: Session, job_id: uuid.UUID, attempt: int) -> dict[str, Any] | None:
    """Return the state of the newest completed step of the job that ``attempt`` owns, or ``None``.

    Raises:
        LeaseLost: ``attempt`` no longer owns the job, or its lease ran out.
    """
    owned(session, job_id, attempt)
    query = select(JobStep.state).where(JobStep.job_id == job_id, JobStep.state.is_not(None))
    packed = session.scalar(query.order_by(JobStep.number.desc()).limit(1))
    session.rollback()
    state: dict[str, Any] | None = None if packed is None else json.loads(zlib.decompress(packed))
    return state


def record_export(
    session: Session, job_id: uuid.UUID, attempt: int, report: dict[str, Any], files: Sequence[dict[str, Any]]
) -> Beat:
    """Record that the pruned model is complete in the object store, and begin to publish it. This write is fenced.

    The repositories are claimed for the job's API key.
    ``files`` are the stored files {name, key, size, sha256}. From then on, every attempt at the job publishes these files.
    Recording the same export twice, because the first answer was lost, changes nothing.

    Raises:
        LeaseLost: ``attempt`` no longer owns the job, or its lease ran out.
        TransitionRefused: the job is being cancelled.
        PruningError: ``repository_taken`` if a job of another API key made one of the repositories meanwhile.
    """
    job = owned(session, job_id, attempt)
    if job.state != State.PUBLISHING:
        repositories.claim(session, job.owner_id, job.id, published_repo_ids(texts.whole_request(job)))
        if job.exported_at is None:
            storage.record(session, job.owner_id, job_id, files)
            usage.count(session, job.owner_id, bytes_stored=sum(file["size"] for file in files))
            job.exported_at, job.report = dt.datetime.now(dt.UTC), report
            job.failures = job.losses = 0
        transitions.apply(session, job, Trigger.PUBLISH)
    return _commit(session, job)


def exported(session: Session, job_id: uuid.UUID, attempt: int) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Return the report and the stored files {name, key, size, sha256} of the job that ``attempt`` owns.

    Raises:
        LeaseLost: ``attempt`` no longer owns the job, or its lease ran out.
    """
    job = owned(session, job_id, attempt)
    columns = ("name", "key", "size", "sha256")
    files = [{name: getattr(file, name) for name in columns} for file in storage.files(session, job_id)]
    report = job.report
    session.rollback()
    assert report is not None, "an exported job has a report"
    return report, files


def succeed(
    session: Session, job_id: uuid.UUID, attempt: int, result: dict[str, Any], progress: dict[str, Any]
) -> State:
    """Record that the job has succeeded, and request the deletion of what it stored on the way. This write is fenced.

    The checkpoints of a job that keeps its steps stay.

    Raises:
        LeaseLost: ``attempt`` no longer owns the job, or its lease ran out.
    """
    job = transitions.apply(session, owned(session, job_id, attempt), Trigger.SUCCEED, result=result, progress=progress)
    kept = {file.key for file in storage.files(session, job_id)}
    folders = [artifacts_folder(job_id, number) for number in range(1, attempt + 1)]
    unused = [folder for folder in folders if not any(key.startswith(folder) for key in kept)]
    if not job.request.get("keep_steps"):
        unused.append(tensors_folder(job_id))
        repository.forget_states(session, [job_id])
    storage.request_deletion(session, unused)
    state = State(job.state)
    session.commit()
    return state


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
    session: Session,
    job_id: uuid.UUID,
    attempt: int,
    error: dict[str, Any],
    patience: Patience,
    place: dict[str, Any] | None = None,
) -> State:
    """Record that the attempt failed with ``error`` {code, message, retryable}, and return the new state; fenced.

    Requeue the job if ``patience`` allows another attempt; otherwise fail the job. ``place`` {stage, step} says where the
    attempt was: an error of the job's own processes that comes a second time at the same place, with no step completed
    in between, fails the job at once. After ``out_of_memory``, the job is left to a larger worker, if one is live.

    Raises:
        LeaseLost: ``attempt`` no longer owns the job, or its lease ran out.
    """
    state = _fail(session, owned(session, job_id, attempt), error, patience, place)
    session.commit()
    return state


def _fail(
    session: Session, job: Job, error: dict[str, Any], patience: Patience, place: dict[str, Any] | None = None
) -> State:
    """Requeue or fail the job after ``error``.

    Three budgets limit the attempts at a job. A lost worker counts against ``max_losses``, because the job is rarely
    the cause. A Hub that does not answer counts against ``publish`` seconds in a row, because the pruned model is ready.
    Every other retryable error counts against ``max_failures``. A move to a larger worker counts against none of them:
    each move leaves fewer workers that are larger still.
    """
    if job.failures and _repeats(session, job, error, place):
        error = {**error, "retryable": False, "message": f"{error['message']} It happened twice at the same place."}
    if job.state == State.CANCELLING:
        transitions.apply(session, job, Trigger.FAIL, reason=error)
        return State(job.state)
    now = dt.datetime.now(dt.UTC)
    failures, losses, again, waiting_since = job.failures, job.losses, bool(error["retryable"]), None
    if error["code"] == ErrorCode.WORKER_LOST:
        losses += 1
        again, wait = losses < patience.max_losses, patience.backoff * 2 ** (losses - 1)
    elif error["code"] in WAITS_FOR_HUB and job.exported_at is not None:
        waiting_since = job.waiting_since or now
        waited = (now - waiting_since).total_seconds()
        again, wait = waited < patience.publish, max(patience.backoff, waited / 4)
    elif error["code"] == ErrorCode.OUT_OF_MEMORY and (outgrown := _outgrow(session, job)) is not None:
        again, wait = _has_holder(session, job, patience), 0.0
        failures += not again
        follows = "the job moves to a worker with more" if again else "no larger worker that can hold the job is live"
        error = {**error, "message": f"{error['message']} The worker has {gib(outgrown)} of memory; {follows}."}
    else:
        failures += 1
        again, wait = again and failures < patience.max_failures, patience.backoff * 2 ** (failures - 1)
    if again:
        counts = {"failures": failures, "losses": losses, "waiting_since": waiting_since}
        wait = min(wait, LONGEST_WAIT)
        transitions.apply(session, job, Trigger.REQUEUE, reason=error, **counts, not_before=_in(wait), last_error=error)
        data = {"error": error, "failures": failures, "losses": losses, "place": place}
        transitions.record_event(session, job, "retry", data)
    else:
        transitions.apply(session, job, Trigger.FAIL, reason=error, failures=failures, losses=losses, error=error)
        if error["code"] in UNWRITTEN:
            repositories.release(session, job.id)
    return State(job.state)


def _outgrow(session: Session, job: Job) -> int | None:
    """Leave the job to workers with more memory than its worker, and return that memory, or ``None`` if it is not known."""
    worker = None if job.worker is None else fleet.get(session, job.worker)
    memory = None if worker is None else fleet.offer(worker).memory_bytes
    if memory is not None:
        job.outgrown_memory_bytes = max(memory, job.outgrown_memory_bytes or 0)
    return memory


def _has_holder(session: Session, job: Job, patience: Patience) -> bool:
    """Return whether a worker that is live and not drained can hold the job; it may be busy."""
    return any(Required.of(job).holds(offer) for offer in fleet.offers(session, patience.worker_silence))


def _repeats(session: Session, job: Job, error: dict[str, Any], place: dict[str, Any] | None) -> bool:
    """Return whether the job's last failure was the same error of its own processes at the same place."""
    if place is None or error["code"] not in OWN_FAULTS:
        return False
    query = select(JobEvent.data).where(JobEvent.job_id == job.id, JobEvent.type == "retry")
    last = session.scalars(query.order_by(JobEvent.id.desc()).limit(1)).one_or_none() or {}
    return bool(last.get("place") == place and last["error"]["code"] == error["code"])


def owners(session: Session) -> list[tuple[uuid.UUID, int]]:
    """Return the job and the number of each attempt that owns its job, or owned it until its lease ran out."""
    return [
        (job_id, attempt) for job_id, attempt in session.execute(select(Job.id, Job.attempt).where(Job.state.in_(LIVE)))
    ]


def reap(session: Session, patience: Patience, limit: int = 100) -> list[uuid.UUID]:
    """Requeue the jobs whose lease ran out, or fail them at ``patience.max_losses``, and return their ids.

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
    # Usage is counted in the order of the keys, so that callers at the same time never wait for each other.
    for job in sorted(session.scalars(query).all(), key=lambda job: job.owner_id):
        if job.state == State.CANCELLING:
            transitions.apply(session, job, Trigger.REQUEUE, reason=error)
        else:
            _fail(session, job, error, patience)
        reaped.append(job.id)
    session.commit()
    return reaped
