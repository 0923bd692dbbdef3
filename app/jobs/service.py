"""The rules of jobs: the layer between the HTTP routes and the database tables."""

import os
import shutil
import stat
import uuid
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastapi.concurrency import run_in_threadpool
from pydantic import SecretStr
from sqlalchemy import Row
from sqlalchemy.orm import Session

from app.auth import repository as keys
from app.config import Settings
from app.db.session import session_factory
from app.fleet import repository as fleet
from app.http import idempotency, logs
from app.http.problem import Problem, invalid
from app.jobs import admission, leases, repository, texts, tokens, transitions
from app.jobs.models import Job, JobEvent, JobStep
from app.jobs.schemas import JobFilter
from app.jobs.transitions import Trigger
from secateur.catalog.request import JobRequest
from secateur.contract.errors import ErrorCode, PruningError
from secateur.contract.jobs import DryRun
from secateur.contract.states import TERMINAL, State

TRASH = ".deleted"
"""Suffix of the name of a deleted job's folder."""
ROOM_AFTER = 60
"""Number of seconds after which the API key may have room for one more job (``Retry-After``)."""
LEFTOVERS = ("attempt-*", ".attempt-*", "step-*.tmp")
"""Patterns of the files and folders that killed workers leave in a job's folder."""


@dataclass(frozen=True)
class _Intake:
    """What the database knows that concerns a new job."""

    digest: str
    kept: bytes | None
    """The request's own Hub token, encrypted."""
    token: SecretStr | None
    largest: tuple[int, str] | None


async def dry_run(settings: Settings, owner_id: uuid.UUID, request: JobRequest) -> DryRun:
    """Return the plan of the job without creating a job.

    Raises:
        Problem: the service cannot serve the request.
        PruningError: the model cannot be pruned as requested; retryable if the Hub does not answer.
    """
    token, largest = await run_in_threadpool(_token_and_largest, settings, owner_id, request)

    def plan() -> DryRun:
        return admission.dry_run(admission.admit(request, settings, token), settings, token, largest)

    return await admission.checked(plan, request, settings, owner_id)


async def create(settings: Settings, owner_id: uuid.UUID, request: JobRequest, key: str | None) -> Job:
    """Create a job, or return the job that the same idempotency key created.

    The request waits for the Hub without a database connection.

    Raises:
        Problem: the service cannot serve the request, the API key has too many open jobs, or the idempotency key was
            used for another request or for a job that was deleted.
        PruningError: the model cannot be pruned as requested.
    """
    intake = await run_in_threadpool(_begin, settings, owner_id, request, key)
    if isinstance(intake, Job):
        return intake

    def admit() -> JobRequest:
        admitted = admission.admit(request, settings, intake.token)
        try:
            revision = admission.dry_run(admitted, settings, intake.token, intake.largest).revision
        except PruningError as error:
            if not error.retryable:
                raise
            revision = None
        return admitted.model_copy(update={"revision": revision or request.revision})

    admitted = await admission.checked(admit, request, settings, owner_id)
    return await run_in_threadpool(_store, settings, owner_id, admitted, intake, key)


def _token_and_largest(
    settings: Settings, owner_id: uuid.UUID, request: JobRequest
) -> tuple[SecretStr | None, tuple[int, str] | None]:
    with session_factory()() as session:
        token = tokens.for_request(session, settings, owner_id, request.hub_token)
        return token, fleet.largest(session, settings.worker_silence)


def _begin(settings: Settings, owner_id: uuid.UUID, request: JobRequest, key: str | None) -> Job | _Intake:
    digest = idempotency.fingerprint(request.model_dump(mode="json", exclude={"hub_token"}))
    if key is not None:
        with session_factory()() as session:
            if earlier := _replay(session, settings, owner_id, key, digest):
                return earlier
    kept = tokens.keep(settings, request.hub_token)
    return _Intake(digest, kept, *_token_and_largest(settings, owner_id, request))


def _store(settings: Settings, owner_id: uuid.UUID, admitted: JobRequest, intake: _Intake, key: str | None) -> Job:
    shown, given = texts.set_apart(admitted.model_dump(mode="json", exclude={"hub_token"}))
    with session_factory()() as session:
        _check_room(session, settings, owner_id)
        job = Job(
            owner_id=owner_id,
            request=shown,
            texts=given,
            hub_token=intake.kept,
            model_id=admitted.model_id,
            method=admitted.method,
            labels=admitted.labels,
            request_id=logs.request_id(),
        )
        repository.add(session, job)
        ttl = settings.idempotency_ttl
        if key is not None and not idempotency.remember(session, owner_id, key, intake.digest, job.id, ttl):
            session.rollback()
            winner = _replay(session, settings, owner_id, key, intake.digest)
            assert winner is not None, "whoever took the key has committed it"
            return winner
        session.commit()
        return job


def _check_room(session: Session, settings: Settings, owner_id: uuid.UUID) -> None:
    """Check that the API key may have one more job; other requests of the key wait here until this one is committed.

    Raises:
        Problem: 429 if the key has as many open jobs as it may have.
    """
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


def view(session: Session, owner_id: uuid.UUID, job_id: uuid.UUID) -> Row[Any]:
    """Return the public columns of the owner's job as plain values; see :func:`app.jobs.repository.view`.

    Raises:
        Problem: 404 if the job does not exist or belongs to another owner.
    """
    job = repository.view(session, owner_id, job_id)
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
        afresh = {"failures": 0, "not_before": None}
    transitions.apply(session, job, trigger, **afresh)
    session.commit()
    return job


def delete(session: Session, settings: Settings, owner_id: uuid.UUID, job_id: uuid.UUID) -> None:
    """Delete a finished job, commit, and remove its folder.

    If the process is killed while it removes the folder, :func:`delete_trash` removes the rest.

    Raises:
        Problem: 404 if the job does not exist or belongs to another owner, 409 if the job has not ended.
    """
    job = get(session, owner_id, job_id, locked=True)
    if job.state not in TERMINAL:
        raise Problem(
            409, ErrorCode.WRONG_STATE, f"A job that is {job.state} cannot be deleted; cancel it.", state=job.state
        )
    repository.delete(session, job)
    session.commit()
    folder = settings.job_dir(job_id)
    trash = folder.with_name(folder.name + TRASH)
    with suppress(FileNotFoundError):
        folder.rename(trash)  # the rename is atomic, so no request lists a half-deleted folder
    shutil.rmtree(trash, ignore_errors=True)


def delete_abandoned_attempts(session: Session, settings: Settings) -> None:
    """Remove the files that killed workers left of attempts at jobs that no worker owns any more."""
    leftovers = [path for pattern in LEFTOVERS for path in settings.jobs_dir.glob(f"*/{pattern}")]
    owned = {str(job_id) for job_id in leases.owned_ids(session)}
    for leftover in leftovers:  # listed before the owned jobs: a later file may belong to a new attempt
        if leftover.parent.name in owned:
            continue
        if leftover.is_dir():
            shutil.rmtree(leftover, ignore_errors=True)
        else:
            leftover.unlink(missing_ok=True)


def delete_expired_files(session: Session, settings: Settings) -> None:
    """Remove the files of jobs that ended longer ago than the retention time; the jobs themselves stay."""
    if settings.retention is None or not settings.jobs_dir.is_dir():
        return
    kept = []
    for folder in settings.jobs_dir.iterdir():
        with suppress(ValueError):
            kept.append(uuid.UUID(folder.name))
    for job_id in repository.ended_before(session, settings.retention, kept):
        shutil.rmtree(settings.job_dir(job_id), ignore_errors=True)


def delete_trash(settings: Settings) -> None:
    """Remove the folders of deleted jobs whose removal was interrupted."""
    for trash in settings.jobs_dir.glob(f"*{TRASH}"):
        shutil.rmtree(trash, ignore_errors=True)


def events(
    session: Session, owner_id: uuid.UUID, job_id: uuid.UUID, after: int, limit: int
) -> tuple[Row[Any], Sequence[JobEvent]]:
    """Return the job and up to ``limit`` of its events after event ``after``.

    If the job has ended, its last event is already stored.

    Raises:
        Problem: 404 if the job does not exist or belongs to another owner.
    """
    job = view(session, owner_id, job_id)
    return job, repository.events(session, job_id, after, limit)


def steps(session: Session, owner_id: uuid.UUID, job_id: uuid.UUID) -> Sequence[JobStep]:
    """Return the completed steps of the job.

    Raises:
        Problem: 404 if the job does not exist or belongs to another owner.
    """
    return repository.steps(session, get(session, owner_id, job_id).id)


def report(session: Session, owner_id: uuid.UUID, job_id: uuid.UUID) -> dict[str, Any]:
    """Return the complete result of the job.

    Raises:
        Problem: 404 if the job does not exist or belongs to another owner, 409 if the job has no report.
    """
    job = get(session, owner_id, job_id)
    if job.report is None:
        raise Problem(409, ErrorCode.NO_REPORT, f"A job that is {job.state} has no report.", state=job.state)
    return job.report


def artifacts(
    session: Session, settings: Settings, owner_id: uuid.UUID, job_id: uuid.UUID
) -> dict[str, tuple[Path, os.stat_result]]:
    """Return the files of the pruned model by name, with the status of each file.

    A name is the file's path below the artifacts folder, with ``/``.
    Return no files until the job has succeeded.

    Raises:
        Problem: 404 if the job does not exist or belongs to another owner.
    """
    job = get(session, owner_id, job_id)
    folder = settings.job_dir(job_id) / "artifacts"
    if job.state != State.SUCCEEDED or not folder.is_dir():
        return {}
    try:
        found = {path.relative_to(folder).as_posix(): (path, path.lstat()) for path in sorted(folder.rglob("*"))}
    except FileNotFoundError:  # the job was deleted during the listing
        raise no_job(job_id) from None
    return {name: (path, status) for name, (path, status) in found.items() if stat.S_ISREG(status.st_mode)}
