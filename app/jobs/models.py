"""The tables of a job: the job itself, its events and its completed steps."""

import datetime as dt
import uuid
from typing import Any

from sqlalchemy import BigInteger, ForeignKey, Identity, Index, func, text
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
        Index("ix_jobs_queued", "id", postgresql_where=text("state = 'queued'")),
        Index("ix_jobs_leased", "lease_expires_at", postgresql_where=text("lease_expires_at IS NOT NULL")),
        Index("ix_jobs_owner_id", "owner_id", "id"),
        Index("ix_jobs_open", "owner_id", postgresql_where=text("state NOT IN ('succeeded', 'failed', 'cancelled')")),
        Index("ix_jobs_owner_id_state", "owner_id", "state", "id"),
        Index("ix_jobs_owner_id_method", "owner_id", "method", "id"),
        Index("ix_jobs_owner_id_model_id", "owner_id", "model_id", "id"),
        Index("ix_jobs_labels", "labels", postgresql_using="gin"),
        Index("ix_jobs_finished_at", "finished_at"),
    )

    id: Mapped[uuid.UUID] = mapped_column(primary_key=True, default=new_id)
    owner_id: Mapped[uuid.UUID] = mapped_column(ForeignKey(ApiKey.id))
    state: Mapped[str] = mapped_column(default="queued")
    version: Mapped[int] = mapped_column(default=1)
    request: Mapped[dict[str, Any]]
    """The request as the API shows it, with counts and hashes in place of texts."""
    texts: Mapped[dict[str, Any] | None] = mapped_column(deferred=True)
    """The request's texts by part; see :mod:`app.jobs.texts`."""
    model_id: Mapped[str]
    method: Mapped[str]
    labels: Mapped[dict[str, str]] = mapped_column(default=dict)
    request_id: Mapped[str | None]
    """Id of the HTTP request that created the job; the request's log lines carry the same id."""

    attempt: Mapped[int] = mapped_column(default=0)
    failures: Mapped[int] = mapped_column(default=0)
    worker: Mapped[str | None]
    lease_expires_at: Mapped[dt.datetime | None]
    dispatched_at: Mapped[dt.datetime | None]
    not_before: Mapped[dt.datetime | None]
    pause_requested: Mapped[bool] = mapped_column(default=False)
    may_be_published: Mapped[bool] = mapped_column(default=False)
    """Whether some attempt began to publish; a commit of the job may be on the Hub."""

    hub_token: Mapped[bytes | None] = mapped_column(deferred=True)
    """The request's Hub token, encrypted (see :mod:`app.auth.vault`); removed when the job has succeeded."""

    progress: Mapped[dict[str, Any] | None]
    error: Mapped[dict[str, Any] | None]
    result: Mapped[dict[str, Any] | None]
    report: Mapped[dict[str, Any] | None]

    created_at: Mapped[dt.datetime] = mapped_column(server_default=func.now())
    updated_at: Mapped[dt.datetime] = mapped_column(server_default=func.now(), onupdate=func.now())
    started_at: Mapped[dt.datetime | None]
    finished_at: Mapped[dt.datetime | None]


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


class JobStep(Base):
    """A completed step of a job and its checkpoint, from which a later attempt resumes.

    Step 0 is the baseline: the measurement of the unpruned model.
    """

    __tablename__ = "job_steps"
    __table_args__ = (Index("ix_job_steps_created_at", "created_at"),)

    job_id: Mapped[uuid.UUID] = mapped_column(ForeignKey("jobs.id", ondelete="CASCADE"), primary_key=True)
    number: Mapped[int] = mapped_column(primary_key=True)
    attempt: Mapped[int]
    path: Mapped[str]
    """Path of the checkpoint file, relative to the job's folder."""
    sha256: Mapped[str]
    data: Mapped[dict[str, Any]]
    created_at: Mapped[dt.datetime] = mapped_column(server_default=func.now())
