"""The tables of a job: the job itself, its attempts, its events and its completed steps."""

import datetime as dt
import uuid
from typing import Any

from sqlalchemy import BigInteger, ForeignKey, Identity, Index, desc, func, text
from sqlalchemy.orm import Mapped, mapped_column

from app.auth.models import ApiKey
from app.db.base import Base, new_id


class Job(Base):
    """One accepted request. Only :mod:`app.jobs.transitions` changes ``state``.

    ``attempt`` is the fencing token: every claim increases it by one, and every write of a worker names the worker's
    attempt. ``lease_expires_at`` is set while a worker owns the job. Every visible change increases ``version`` (ETag).
    """

    __tablename__ = "jobs"
    __table_args__ = (
        Index("ix_jobs_queued", "owner_id", desc("priority"), "id", postgresql_where=text("state = 'queued'")),
        Index("ix_jobs_leased", "lease_expires_at", postgresql_where=text("lease_expires_at IS NOT NULL")),
        Index("ix_jobs_owner_id", "owner_id", "id"),
        Index("ix_jobs_open", "owner_id", postgresql_where=text("state NOT IN ('succeeded', 'failed', 'cancelled')")),
        Index("ix_jobs_owner_id_state", "owner_id", "state", "id"),
        Index("ix_jobs_owner_id_method", "owner_id", "method", "id"),
        Index("ix_jobs_owner_id_model_id", "owner_id", "model_id", "id"),
        Index("ix_jobs_labels", "labels", postgresql_using="gin"),
        Index("ix_jobs_finished_at", "finished_at"),
        Index("ix_jobs_expires_at", "expires_at", postgresql_where=text("expires_at IS NOT NULL AND NOT expired")),
    )

    id: Mapped[uuid.UUID] = mapped_column(primary_key=True, default=new_id)
    owner_id: Mapped[uuid.UUID] = mapped_column(ForeignKey(ApiKey.id))
    state: Mapped[str] = mapped_column(default="queued")
    version: Mapped[int] = mapped_column(default=1)
    request: Mapped[dict[str, Any]]
    """The request as the API shows it, with counts and hashes in place of texts."""
    texts: Mapped[dict[str, Any] | None] = mapped_column(deferred=True)
    """The request's texts by part; see :mod:`app.jobs.texts`."""
    derived_from: Mapped[uuid.UUID | None]
    """The job whose request was changed to make this job's; that job may be deleted since."""
    model_id: Mapped[str]
    method: Mapped[str]
    labels: Mapped[dict[str, str]] = mapped_column(default=dict)
    priority: Mapped[int] = mapped_column(default=0, server_default="0")
    """Jobs of one API key with a higher priority run first."""
    required_labels: Mapped[dict[str, str]] = mapped_column(default=dict, server_default="{}")
    """Labels that a worker must have to take the job."""
    required_memory_bytes: Mapped[int | None] = mapped_column(BigInteger)
    """Memory that a worker's device must have to take the job; ``None`` if the need is not known."""
    outgrown_memory_bytes: Mapped[int | None] = mapped_column(BigInteger)
    """Memory of the largest worker that was too small for the job; only a worker that is known to have more may take it."""
    request_id: Mapped[str | None]
    """Id of the HTTP request that created the job; the request's log lines carry the same id."""
    traceparent: Mapped[str | None]
    """Span of that request (W3C Trace Context), of which the spans of the job's attempts are children."""

    attempt: Mapped[int] = mapped_column(default=0)
    failures: Mapped[int] = mapped_column(default=0)
    """Number of failed attempts since the last completed step."""
    losses: Mapped[int] = mapped_column(default=0)
    """Number of attempts since the last completed step whose worker was lost."""
    worker: Mapped[str | None]
    claimed_at: Mapped[dt.datetime | None]
    """Time at which the last attempt claimed the job; the worker seconds of the attempt count from it."""
    lease_expires_at: Mapped[dt.datetime | None]
    not_before: Mapped[dt.datetime | None]
    pause_requested: Mapped[bool] = mapped_column(default=False)
    may_be_published: Mapped[bool] = mapped_column(default=False)
    """Whether some attempt began to publish; a commit of the job may be on the Hub."""

    hub_token: Mapped[bytes | None] = mapped_column(deferred=True)
    """The request's Hub token, encrypted (see :mod:`app.auth.vault`); removed when the job has succeeded."""

    exported_at: Mapped[dt.datetime | None]
    """Time at which the pruned model was complete in the object store; then only publishing remains."""

    progress: Mapped[dict[str, Any] | None]
    error: Mapped[dict[str, Any] | None]
    last_error: Mapped[dict[str, Any] | None]
    """The error for which a queued job waits for its next attempt."""
    waiting_since: Mapped[dt.datetime | None]
    """Time of the first of the attempts in a row at which the Hub or the store did not answer a job that is exported."""
    result: Mapped[dict[str, Any] | None]
    report: Mapped[dict[str, Any] | None] = mapped_column(deferred=True)

    created_at: Mapped[dt.datetime] = mapped_column(server_default=func.now())
    updated_at: Mapped[dt.datetime] = mapped_column(server_default=func.now(), onupdate=func.now())
    started_at: Mapped[dt.datetime | None]
    finished_at: Mapped[dt.datetime | None]
    expires_at: Mapped[dt.datetime | None]
    """Time at which the artifacts of a published job, or the checkpoints of a failed or cancelled job, are deleted."""
    expired: Mapped[bool] = mapped_column(default=False)
    """Whether the files were deleted at ``expires_at``."""


class Attempt(Base):
    """One attempt at a job, and how it ended. The row stays when the job is deleted: it says what a key has used.

    A worker's time is ``ended_at - started_at``; an attempt that goes on has no ``ended_at`` and no ``outcome``.
    """

    __tablename__ = "attempts"
    __table_args__ = (Index("ix_attempts_owner_id_ended_at", "owner_id", "ended_at"),)

    job_id: Mapped[uuid.UUID] = mapped_column(primary_key=True)
    attempt: Mapped[int] = mapped_column(primary_key=True)
    owner_id: Mapped[uuid.UUID] = mapped_column(ForeignKey(ApiKey.id))
    worker: Mapped[str]
    started_at: Mapped[dt.datetime] = mapped_column(server_default=func.now())
    ended_at: Mapped[dt.datetime | None]
    outcome: Mapped[str | None]
    """A name of :class:`app.jobs.attempts.Outcome`."""
    error_code: Mapped[str | None]
    """The code of the error that the attempt failed with."""


class JobEvent(Base):
    """One event of a job; ``id`` is the cursor of the event stream."""

    __tablename__ = "job_events"
    __table_args__ = (
        Index("ix_job_events_job_id", "job_id", "id"),
        Index("ix_job_events_retries", "created_at", postgresql_where=text("type = 'retry'")),
    )

    id: Mapped[int] = mapped_column(BigInteger, Identity(), primary_key=True)
    job_id: Mapped[uuid.UUID] = mapped_column(ForeignKey("jobs.id", ondelete="CASCADE"))
    attempt: Mapped[int]
    type: Mapped[str]
    data: Mapped[dict[str, Any]]
    created_at: Mapped[dt.datetime] = mapped_column(server_default=func.now())


class JobLogLine(Base):
    """A line that a process of an attempt wrote, for the owner of the job: without secrets and paths of the service.

    Only the newest lines of a job are kept, see :func:`app.jobs.leases.renew`.
    """

    __tablename__ = "job_logs"

    job_id: Mapped[uuid.UUID] = mapped_column(ForeignKey("jobs.id", ondelete="CASCADE"), primary_key=True)
    attempt: Mapped[int] = mapped_column(primary_key=True)
    number: Mapped[int] = mapped_column(primary_key=True)
    """The number of the line in its attempt, from 1."""
    written_at: Mapped[dt.datetime]
    """The time at which the worker read the line, by the worker's clock."""
    text: Mapped[str]


class JobStep(Base):
    """A completed step of a job and its checkpoint, from which a later attempt resumes.

    Step 0 is the baseline: the measurement of the unpruned model.
    """

    __tablename__ = "job_steps"
    __table_args__ = (Index("ix_job_steps_created_at", "created_at"),)

    job_id: Mapped[uuid.UUID] = mapped_column(ForeignKey("jobs.id", ondelete="CASCADE"), primary_key=True)
    number: Mapped[int] = mapped_column(primary_key=True)
    attempt: Mapped[int]
    data: Mapped[dict[str, Any]]
    state: Mapped[bytes | None] = mapped_column(deferred=True)
    """The state of the run after the step, as JSON that zlib compressed; only the newest step of a job that has
    not ended, and the steps that are kept for publishing, have one."""
    kept_bytes: Mapped[int] = mapped_column(BigInteger, default=0, server_default="0")
    """Bytes that the step added to the store for a job that keeps its steps; they count while ``state`` is set."""
    created_at: Mapped[dt.datetime] = mapped_column(server_default=func.now())
