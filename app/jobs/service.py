"""The rules of jobs: the layer between the HTTP routes and the database tables."""

import uuid
from collections.abc import Mapping, Sequence
from typing import Any

from sqlalchemy import Row
from sqlalchemy.orm import Session

from app.auth import repository as keys
from app.config import Settings
from app.fleet import repository as fleet
from app.http import idempotency, logs
from app.http.problem import Problem, invalid
from app.jobs import admission, repository, tokens, transitions
from app.jobs.models import Job, JobEvent, JobStep
from app.jobs.schemas import JobFilter
from app.jobs.transitions import Trigger
from app.storage import repository as storage
from app.storage.models import StoredFile
from app.storage.service import job_folder
from secateur.catalog.request import JobRequest
from secateur.contract.errors import ErrorCode, PruningError
from secateur.contract.jobs import DryRun
from secateur.contract.states import TERMINAL

ROOM_AFTER = 60
"""Number of seconds after which the API key may have room for one more job (``Retry-After``)."""


def dry_run(session: Session, settings: Settings, owner_id: uuid.UUID, request: JobRequest) -> DryRun:
    """Return the plan of the job without creating a job.

    Raises:
        Problem: the service cannot serve the request.
        PruningError: the model cannot be pruned as requested; retryable if the Hub does not answer.
    """
    token = tokens.for_request(session, settings, owner_id, request.hub_token)
    largest = fleet.largest(session, settings.worker_silence)
    session.rollback()  # returns the connection to the pool before the request to the Hub
    return admission.dry_run(admission.admit(request, settings, token), settings, token, largest)


def create(session: Session, settings: Settings, owner_id: uuid.UUID, request: JobRequest, key: str | None) -> Job:
    """Create a job, or return the job that the same idempotency key created; commits.

    Raises:
        Problem: the service cannot serve the request, the API key has too many open jobs, or the idempotency key was
            used for another request or for a job that was deleted.
        PruningError: the model cannot be pruned as requested.
    """
    digest = idempotency.fingerprint(request.model_dump(mode="json", exclude={"hub_token"}))
    if key is not None and (earlier := _replay(session, settings, owner_id, key, digest)):
        return earlier
    kept = tokens.keep(settings, request.hub_token)
    token = tokens.for_request(session, settings, owner_id, request.hub_token)
    largest = fleet.largest(session, settings.worker_silence)
    session.rollback()  # returns the connection to the pool before the requests to the Hub
    admitted = admission.admit(request, settings, token)
    try:
        revision = admission.dry_run(admitted, settings, token, largest).revision or request.revision
    except PruningError as error:
        if not error.retryable:
            raise
        revision = request.revision
    _check_room(session, settings, owner_id)
    job = Job(
        owner_id=owner_id,
        request=admitted.model_copy(update={"revision": revision}).model_dump(mode="json", exclude={"hub_token"}),
        hub_token=kept,
        model_id=request.model_id,
        method=request.method,
        labels=request.labels,
        request_id=logs.request_id(),
    )
    repository.add(session, job)
    if key is not None and not idempotency.remember(session, owner_id, key, digest, job.id, settings.idempotency_ttl):
        session.rollback()
        winner = _replay(session, settings, owner_id, key, digest)
        assert winner is not None, "whoever took the key has committed it"
        return winner
    session.commit()
    return job


def _check_room(session: Session, settings: Settings, owner_id: uuid.UUID) -> None:
    """Check that the API key may have one more job; other requests of the key wait here until this one is committed.

    Raises:
        Problem: 429 if the key has as many open jobs as it may have, 403 if the artifacts of its jobs have as many bytes
            as they may have.
    """
    most = settings.max_stored_bytes
    if most is not None and (stored := storage.bytes_of(session, owner_id)) >= most:
        detail = f"The artifacts of this API key's jobs have {stored:,} bytes; {most:,} are allowed. Delete some of the jobs."
        raise Problem(403, ErrorCode.STORAGE_QUOTA_EXCEEDED, detail)
    if settings.max_open_jobs is None:
        return
    keys.lock(session, owner_id)
    if repository.open_count(session, owner_id) >= settings.max_open_jobs:
        detail = f"This API key has {settings.max_open_jobs} jobs that have not ended, as many as it may have."
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


def view(session: Session, owner_id: uuid.UUID, job_id: uuid.UUID, *, bare: bool = False) -> Row[Any]:
    """Return the public columns of the owner's job as plain values; see :func:`app.jobs.repository.view`.

    Raises:
        Problem: 404 if the job does not exist or belongs to another owner.
    """
    job = repository.view(session, owner_id, job_id, bare=bare)
    if job is None:
        raise no_job(job_id)
    return job


def get(session: Session, owner_id: uuid.UUID, job_id: uuid.UUID, *, locked: bool = False) -> Job:
    """Return the owner's job; see :func:`app.jobs.repository.get`.

    Raises:
        Problem: 404 if the job does not exist or belongs to another owner.
    """
    job = repository.get(session, owner_id, job_id, locked=locked)
    if job is None:
        raise no_job(job_id)
    return job


def no_job(job_id: uuid.UUID) -> Problem:
    """Return a 404 problem, which is the same for a missing job and a job of another owner."""
    return Problem(404, ErrorCode.NOT_FOUND, f"There is no job {job_id}.")


def page(
    session: Session,
    owner_id: uuid.UUID,
    wanted: JobFilter,
    labels: Mapping[str, str],
    before: uuid.UUID | None,
    size: int,
) -> tuple[Sequence[Job], uuid.UUID | None]:
    """Return up to ``size`` of the owner's jobs, newest first, and the cursor of the next page if there is one."""
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


def ask(session: Session, owner_id: uuid.UUID, job_id: uuid.UUID, trigger: Trigger) -> Job:
    """Cancel, pause, resume or retry a job; idempotent; commits.

    Raises:
        Problem: 404 if the job does not exist or belongs to another owner.
        TransitionRefused: the job's state does not allow ``trigger``.
    """
    job = get(session, owner_id, job_id, locked=True)
    afresh: dict[str, Any] = {}
    if trigger is Trigger.RETRY and job.state in TERMINAL:
        afresh = {"failures": 0, "losses": 0, "waiting_since": None, "not_before": None}
    transitions.apply(session, job, trigger, **afresh)
    session.commit()
    return job


def delete(session: Session, owner_id: uuid.UUID, job_id: uuid.UUID) -> None:
    """Delete a finished job; commits. The scheduler then deletes the job's files in the object store.

    Raises:
        Problem: 404 if the job does not exist or belongs to another owner, 409 if the job has not ended.
    """
    job = get(session, owner_id, job_id, locked=True)
    if job.state not in TERMINAL:
        raise Problem(
            409, ErrorCode.WRONG_STATE, f"A job that is {job.state} cannot be deleted; cancel it.", state=job.state
        )
    storage.request_deletion(session, [job_folder(job_id)])
    repository.delete(session, job)
    session.commit()


def events(
    session: Session, owner_id: uuid.UUID, job_id: uuid.UUID, after: int, limit: int
) -> tuple[Row[Any], Sequence[JobEvent]]:
    """Return the job and up to ``limit`` of its events after event ``after``.

    If the job has ended, its last event is already stored.

    Raises:
        Problem: 404 if the job does not exist or belongs to another owner.
    """
    job = view(session, owner_id, job_id, bare=True)
    return job, repository.events(session, job_id, after, limit)


def steps(session: Session, owner_id: uuid.UUID, job_id: uuid.UUID) -> Sequence[JobStep]:
    """Return the completed steps of the job.

    Raises:
        Problem: 404 if the job does not exist or belongs to another owner.
    """
    return repository.steps(session, get(session, owner_id, job_id).id)


def report(session: Session, owner_id: uuid.UUID, job_id: uuid.UUID) -> dict[str, Any]:
    """Return the complete result of the job, which exists as soon as the pruned model is written and checked.

    Raises:
        Problem: 404 if the job does not exist or belongs to another owner, 409 if the job has no report.
    """
    job = get(session, owner_id, job_id)
    if job.report is None:
        raise Problem(409, ErrorCode.NO_REPORT, f"A job that is {job.state} has no report.", state=job.state)
    return job.report


def artifacts(session: Session, owner_id: uuid.UUID, job_id: uuid.UUID) -> Sequence[StoredFile]:
    """Return the files of the pruned model by name; there are none before the model is written and checked.

    Raises:
        Problem: 404 if the job does not exist or belongs to another owner.
    """
    return storage.files(session, get(session, owner_id, job_id).id)


def artifact(session: Session, owner_id: uuid.UUID, job_id: uuid.UUID, name: str) -> StoredFile:
    """Return one file of the pruned model.

    Raises:
        Problem: 404 if the job does not exist or belongs to another owner, or has no such file.
    """
    found = storage.file(session, get(session, owner_id, job_id).id, name)
    if found is None:
        raise Problem(404, ErrorCode.NOT_FOUND, f"Job {job_id} has no artifact '{name}'.")
    return found
