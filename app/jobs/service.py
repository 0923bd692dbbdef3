"""The rules of jobs: the layer between the HTTP routes and the database tables.

A caller sees the jobs of its own API key; a caller with the scope ``admin`` sees the jobs of all keys, and its writes to
jobs of other keys are recorded.
"""

import logging
import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from fastapi.concurrency import run_in_threadpool
from sqlalchemy import Row
from sqlalchemy.orm import Session

from app import tracing
from app.auth import repository as keys
from app.auth.service import Caller
from app.config import Settings
from app.datasets import service as datasets
from app.db.session import reading, session_factory
from app.fleet import repository as fleet
from app.fleet.repository import Offer
from app.http import idempotency, logs
from app.http.etags import etag, names
from app.http.problem import Problem, invalid
from app.jobs import admission, checkpoints, repositories, repository, routing, texts, tokens, transitions
from app.jobs.checkpoints import Origin
from app.jobs.derivation import derive
from app.jobs.models import Job, JobEvent, JobLogLine, JobStep
from app.jobs.naming import repo_ids
from app.jobs.routing import Required
from app.jobs.schemas import JobFilter
from app.jobs.tokens import HubAccess
from app.jobs.transitions import TransitionRefused, Trigger
from app.storage import repository as storage
from app.storage.models import StoredFile
from app.storage.service import job_folder
from secateur.catalog.request import DerivedRequest, JobRequest, StepPublication
from secateur.contract.errors import ErrorCode, PruningError
from secateur.contract.jobs import DryRun
from secateur.contract.keys import USER
from secateur.contract.states import TERMINAL, State

log = logging.getLogger(__name__)

ROOM_AFTER = 60
"""Number of seconds after which the API key may have room for one more job (``Retry-After``)."""


@dataclass(frozen=True)
class _Intake:
    """What the database knows that concerns a new job."""

    request: JobRequest
    digest: str
    kept: bytes | None
    """The request's own Hub token, encrypted."""
    access: HubAccess
    offers: Sequence[Offer]


async def dry_run(settings: Settings, caller: Caller, body: JobRequest | DerivedRequest) -> DryRun:
    """Return the plan of the job without creating a job.

    Raises:
        Problem: the service cannot serve the request, or the caller does not see the job that the request names.
        PruningError: the model cannot be pruned as requested; retryable if the Hub does not answer.
    """
    request, access, offers = await run_in_threadpool(_look_up, settings, caller, body)

    def plan() -> DryRun:
        admitted = admission.admit(request, settings, access)
        _check_owned(caller.id, admitted)
        return admission.dry_run(admitted, settings, access.token, offers)

    return await admission.checked(plan, request, settings, caller.id)


async def create(
    settings: Settings,
    caller: Caller,
    body: JobRequest | DerivedRequest,
    key: str | None,
    origin: Origin | None = None,
) -> Job:
    """Create a job, or return the job that the same idempotency key created.

    The request waits for the Hub without a database connection. With an ``origin``, the job begins with its steps.

    Raises:
        Problem: the service cannot serve the request, the caller does not see the job that the request names, the API
            key has too many open jobs, or the idempotency key was used for another request or for a job that was
            deleted.
        PruningError: the model cannot be pruned as requested.
    """
    owner_id = caller.id
    intake = await run_in_threadpool(_begin, settings, caller, body, key, origin)
    if isinstance(intake, Job):
        return intake
    request, derived_from = intake.request, None if isinstance(body, JobRequest) else body.from_job

    def admit() -> tuple[JobRequest, int | None]:
        admitted = admission.admit(request, settings, intake.access)
        _check_owned(owner_id, admitted)
        try:
            planned = admission.dry_run(admitted, settings, intake.access.token, intake.offers)
        except PruningError as error:
            if not error.retryable:
                raise
            return admitted, None
        return admitted.model_copy(update={"revision": planned.revision or request.revision}), planned.memory_bytes

    admitted, estimate = await admission.checked(admit, request, settings, owner_id)
    return await run_in_threadpool(_store, settings, owner_id, admitted, derived_from, estimate, intake, key, origin)


async def publish_step(
    settings: Settings, caller: Caller, job_id: uuid.UUID, number: int, asked: StepPublication, key: str | None
) -> Job:
    """Create a job of the job's API key that publishes a step of the job, which has ended.

    Raises:
        Problem: 404 if the job does not exist or the caller does not see it, 409 if the job has not ended or the step
            has no checkpoint; the errors of :func:`create`.
        PruningError: the errors of :func:`create`.
    """

    def find() -> tuple[uuid.UUID, JobRequest, Origin]:
        with session_factory()() as session:
            job = get(session, caller, job_id)
            derived = checkpoints.derive(session, job, number, asked)
            _record_admin(session, caller, job, "publish_step")
            session.commit()
            return (job.owner_id, *derived)

    owner_id, request, origin = await run_in_threadpool(find)
    return await create(settings, Caller(owner_id, USER), request, key, origin)


def _look_up(
    settings: Settings, caller: Caller, body: JobRequest | DerivedRequest
) -> tuple[JobRequest, HubAccess, Sequence[Offer]]:
    """Return the request that ``body`` makes, its access to the Hub, and what the live workers offer."""
    with session_factory()() as session:
        if isinstance(body, DerivedRequest):
            request = derive(settings, get(session, caller, body.from_job), body)
        else:
            request = body
        access = tokens.for_request(session, settings, caller.id, request.hub_token)
        return request, access, fleet.offers(session, settings.worker_silence)


def _begin(
    settings: Settings, caller: Caller, body: JobRequest | DerivedRequest, key: str | None, origin: Origin | None
) -> Job | _Intake:
    if isinstance(body, DerivedRequest):
        asked = {"from": str(body.from_job), **body.changes}
    else:
        asked = body.model_dump(mode="json", exclude={"hub_token"})
    digest = idempotency.fingerprint(asked if origin is None else {**asked, "resume_from": origin.link})
    if key is not None:
        with session_factory()() as session:
            if earlier := _replay(session, settings, caller.id, key, digest):
                return earlier
    kept = tokens.keep(settings, body.hub_token)
    request, access, offers = _look_up(settings, caller, body)
    return _Intake(request, digest, kept, access, offers)


def _store(
    settings: Settings,
    owner_id: uuid.UUID,
    admitted: JobRequest,
    derived_from: uuid.UUID | None,
    estimate: int | None,
    intake: _Intake,
    key: str | None,
    origin: Origin | None,
) -> Job:
    shown, given = texts.set_apart(admitted.model_dump(mode="json", exclude={"hub_token"}))
    if origin is not None:
        shown["resume_from"] = origin.link
    required = admission.required(admitted, estimate)
    with session_factory()() as session:
        _check_room(session, settings, owner_id)
        datasets.find(session, owner_id, admitted.uploads())
        job = Job(
            owner_id=owner_id,
            request=shown,
            texts=given,
            hub_token=intake.kept,
            derived_from=derived_from,
            model_id=admitted.model_id,
            method=admitted.method,
            labels=admitted.labels,
            priority=admitted.priority,
            required_labels=dict(required.labels),
            required_memory_bytes=required.memory_bytes,
            request_id=logs.request_id(),
            traceparent=tracing.traceparent(),
        )
        repository.add(session, job)
        if origin is not None and not repository.copy_steps(session, origin.job_id, origin.numbers, job.id):
            raise checkpoints.not_kept(origin.job_id, origin.numbers[-1], [])
        ttl = settings.idempotency_ttl
        if key is not None and not idempotency.remember(session, owner_id, key, intake.digest, job.id, ttl):
            session.rollback()
            winner = _replay(session, settings, owner_id, key, intake.digest)
            assert winner is not None, "whoever took the key has committed it"
            return winner
        session.commit()
        return job


def _check_owned(owner_id: uuid.UUID, admitted: JobRequest) -> None:
    """Check that the request names no data set and publishes to no repository of another API key.

    Raises:
        Problem: 422 ``text_not_found`` if a data set does not exist or belongs to another API key.
        PruningError: ``repository_taken`` if another API key's job made a repository.
    """
    uploads = admitted.uploads()
    if uploads or admitted.publish is not None:
        with reading() as session:
            datasets.find(session, owner_id, uploads)
            if admitted.publish is not None:
                repositories.check(session, owner_id, repo_ids(admitted.publish.repo_id, admitted))


def _check_room(session: Session, settings: Settings, owner_id: uuid.UUID) -> None:
    """Check that the API key may have one more job; other requests of the key wait here until this one is committed.

    Raises:
        Problem: 401 if the key was revoked meanwhile, 429 if it has as many open jobs as it may have, 403 if the
            artifacts of its jobs and its data sets have as many bytes as they may have.
    """
    key = keys.lock(session, owner_id)
    if key is None or key.revoked_at is not None:
        raise Problem(401, ErrorCode.UNAUTHORIZED, "This API key was revoked.", headers={"WWW-Authenticate": "Bearer"})
    largest = settings.max_stored_bytes
    if largest is not None and (stored := checkpoints.bytes_of(session, owner_id)) >= largest:
        detail = f"The files of this API key have {stored:,} bytes; {largest:,} are allowed. Delete jobs or data sets."
        raise Problem(403, ErrorCode.STORAGE_QUOTA_EXCEEDED, detail)
    most = settings.max_open_jobs if key.max_open_jobs is None else key.max_open_jobs
    if most is not None and repository.open_count(session, owner_id) >= most:
        detail = f"This API key has {most} jobs that have not ended, as many as it may have."
        raise Problem(429, ErrorCode.TOO_MANY_JOBS, detail, headers={"Retry-After": str(ROOM_AFTER)})


def _replay(session: Session, settings: Settings, owner_id: uuid.UUID, key: str, digest: str) -> Job | None:
    used = idempotency.recall(session, owner_id, key, settings.idempotency_ttl)
    if used is None:
        return None
    if used.request_sha256 != digest:
        message = "this key was used with another body"
        raise invalid("idempotency-key", message, code=ErrorCode.IDEMPOTENCY_KEY_REUSED, allowed="a new key")
    if used.job_id is None:
        raise Problem(410, ErrorCode.JOB_DELETED, "The job that this Idempotency-Key made was deleted.")
    return repository.get(session, owner_id, used.job_id)


def view(session: Session, caller: Caller, job_id: uuid.UUID) -> Row[Any]:
    """Return the public columns of a job that the caller sees as plain values; see :func:`app.jobs.repository.view`.

    Raises:
        Problem: 404 if the job does not exist or the caller does not see it.
    """
    job = repository.view(session, _seen(caller), job_id)
    if job is None:
        raise no_job(job_id)
    return job


def get(session: Session, caller: Caller, job_id: uuid.UUID, *, locked: bool = False) -> Job:
    """Return a job that the caller sees; see :func:`app.jobs.repository.get`.

    Raises:
        Problem: 404 if the job does not exist or the caller does not see it.
    """
    job = repository.get(session, _seen(caller), job_id, locked=locked)
    if job is None:
        raise no_job(job_id)
    return job


def _seen(caller: Caller) -> uuid.UUID | None:
    """Return the API key whose jobs the caller sees, or ``None`` for all keys."""
    return None if caller.is_admin else caller.id


def no_job(job_id: uuid.UUID) -> Problem:
    """Return a 404 problem, which is the same for a missing job and a job of another owner."""
    return Problem(404, ErrorCode.NOT_FOUND, f"There is no job {job_id}.")


def waiting_for(settings: Settings, job: Any) -> str | None:
    """Return what the job waits for, in words, if it is queued and no live worker can hold it; otherwise ``None``."""
    if job.state != State.QUEUED:
        return None
    return routing.waiting_for(Required.of(job), offers_of(settings.worker_silence, int(time.monotonic())))


@lru_cache(maxsize=1)
def offers_of(within_seconds: float, second: int) -> list[Offer]:
    """Return what the live workers offer, read once in each ``second``, because queued jobs are polled much more often.

    ``within_seconds`` is the age of the heartbeat of a live worker.
    """
    with reading() as session:
        return fleet.offers(session, within_seconds)


def page(
    session: Session,
    owner_id: uuid.UUID | None,
    wanted: JobFilter,
    labels: Mapping[str, str],
    before: uuid.UUID | None,
    size: int,
) -> tuple[Sequence[Job], uuid.UUID | None]:
    """Return up to ``size`` of the owner's jobs, newest first, and the cursor of the next page if there is one.

    An ``owner_id`` of ``None`` lists the jobs of all owners.
    """
    jobs = repository.newest(
        session,
        owner_id,
        states=wanted.state,
        method=wanted.method,
        model_id=wanted.model_id,
        labels=labels,
        before=before,
        limit=size + 1,
    )
    return jobs[:size], jobs[size - 1].id if len(jobs) > size else None


def ask(session: Session, caller: Caller, job_id: uuid.UUID, trigger: Trigger) -> Job:
    """Cancel, pause, resume or retry a job; idempotent; commits.

    Raises:
        Problem: 404 if the job does not exist or the caller does not see it.
        TransitionRefused: the job's state does not allow ``trigger``.
    """
    job = get(session, caller, job_id, locked=True)
    afresh: dict[str, Any] = {}
    if trigger is Trigger.RETRY and job.state in TERMINAL:
        afresh = {"failures": 0, "losses": 0, "waiting_since": None, "not_before": None}
    transitions.apply(session, job, trigger, **afresh)
    _record_admin(session, caller, job, trigger)
    session.commit()
    return job


def label(session: Session, caller: Caller, job_id: uuid.UUID, labels: Mapping[str, str], if_match: str | None) -> Job:
    """Replace the labels of a job and return the job; commits. ``if_match`` is the value of ``If-Match``, if it was sent.

    Raises:
        Problem: 404 if the job does not exist or the caller does not see it, 412 if the job is not the one that
            ``if_match`` names.
    """
    job = get(session, caller, job_id, locked=True)
    if if_match is not None and not names(if_match, etag(job.version)):
        detail = f"The job has changed; its entity tag is {etag(job.version)}."
        raise Problem(412, ErrorCode.JOB_CHANGED, detail)
    if job.labels != labels:
        repository.label(session, job, labels)
        _record_admin(session, caller, job, "label")
    session.commit()
    return job


def _record_admin(session: Session, caller: Caller, job: Job, action: str) -> None:
    """Append an event to a job of another API key on which an administrator acted."""
    if caller.id != job.owner_id:
        transitions.record_event(session, job, "admin", {"key_id": str(caller.id), "action": action})


def cancel_all(session: Session, owner_id: uuid.UUID, actor_id: uuid.UUID | None) -> tuple[int, int]:
    """Cancel all jobs of an API key that have not ended, and return how many are cancelled and how many go on.

    A job that began to publish goes on, because its model may be published already. ``actor_id`` is the API key that
    asked for this, or ``None`` for an operator at the command line. Each job is committed for itself.
    """
    cancelled = left = 0
    for job_id in repository.open_ids(session, owner_id):
        job = repository.get(session, owner_id, job_id, locked=True)
        if job is None or job.state in TERMINAL:
            session.rollback()
            continue
        try:
            transitions.apply(session, job, Trigger.CANCEL)
        except TransitionRefused:
            session.rollback()
            left += 1
            continue
        data = {"key_id": actor_id and str(actor_id), "action": str(Trigger.CANCEL)}
        transitions.record_event(session, job, "admin", data)
        session.commit()
        cancelled += 1
    session.rollback()
    return cancelled, left


def delete(session: Session, caller: Caller, job_id: uuid.UUID) -> None:
    """Delete a finished job; commits. A log line records the deletion of another key's job.

    The scheduler then deletes the job's files in the object store.

    Raises:
        Problem: 404 if the job does not exist or the caller does not see it, 409 if the job has not ended.
    """
    job = get(session, caller, job_id, locked=True)
    if job.state not in TERMINAL:
        raise Problem(
            409, ErrorCode.WRONG_STATE, f"A job that is {job.state} cannot be deleted; cancel it.", state=job.state
        )
    storage.request_deletion(session, [job_folder(job_id)])
    repository.delete(session, job)
    session.commit()
    if caller.id != job.owner_id:
        log.warning("audit: admin key %s deleted job %s of key %s", caller.id, job_id, job.owner_id)


def events(
    session: Session, caller: Caller, job_id: uuid.UUID, after: int, limit: int
) -> tuple[Row[Any], Sequence[JobEvent]]:
    """Return the job and up to ``limit`` of its events after event ``after``.

    If the job has ended, its last event is already stored.

    Raises:
        Problem: 404 if the job does not exist or the caller does not see it.
    """
    job = view(session, caller, job_id)
    return job, repository.events(session, job_id, after, limit)


def log_lines(
    session: Session, caller: Caller, job_id: uuid.UUID, after: tuple[int, int], limit: int
) -> tuple[Row[Any], Sequence[JobLogLine]]:
    """Return the job and up to ``limit`` lines of its log after the line ``after`` (attempt, number).

    If the job has ended, its last line is already stored.

    Raises:
        Problem: 404 if the job does not exist or belongs to another owner.
    """
    job = view(session, caller, job_id)
    return job, repository.log(session, job_id, after, limit)


def steps(session: Session, caller: Caller, job_id: uuid.UUID) -> Sequence[JobStep]:
    """Return the completed steps of the job.

    Raises:
        Problem: 404 if the job does not exist or the caller does not see it.
    """
    return repository.steps(session, get(session, caller, job_id).id)


def own_run(session: Session, caller: Caller, job_id: uuid.UUID) -> Job:
    """Return a job that the caller sees and that pruned its model itself.

    Raises:
        Problem: 404 if the job does not exist or the caller does not see it, 409 if it publishes a step of another job.
    """
    job = get(session, caller, job_id)
    if (origin := job.request.get("resume_from")) is not None:
        detail = f"Job {job_id} publishes step {origin['step']} of job {origin['job']}, whose recipe made the model."
        raise Problem(409, ErrorCode.NO_RECIPE, detail)
    return job


def report(session: Session, caller: Caller, job_id: uuid.UUID) -> dict[str, Any]:
    """Return the complete result of the job, which exists as soon as the pruned model is written and checked.


    Raises:
        Problem: 404 if the job does not exist or the caller does not see it, 409 if the job has no report.
    """
    job = get(session, caller, job_id)
    if job.report is None:
        raise Problem(409, ErrorCode.NO_REPORT, f"A job that is {job.state} has no report.", state=job.state)
    return job.report


def artifacts(session: Session, caller: Caller, job_id: uuid.UUID) -> Sequence[StoredFile]:
    """Return the files of the pruned model by name; there are none before the model is written and checked.

    Raises:
        Problem: 404 if the job does not exist or the caller does not see it.
    """
    return storage.files(session, get(session, caller, job_id).id)


def artifact(session: Session, caller: Caller, job_id: uuid.UUID, name: str) -> StoredFile:
    """Return one file of the pruned model.

    Raises:
        Problem: 404 if the job does not exist or the caller does not see it, or the job has no such file.
    """
    job = get(session, caller, job_id)
    found = None if "\0" in name else storage.file(session, job.id, name)  # Postgres stores no NUL
    if found is None:
        raise Problem(404, ErrorCode.NOT_FOUND, f"Job {job_id} has no artifact '{name}'.")
    return found
