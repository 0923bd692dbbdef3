"""The tables of a job: the row of record, what happened to it, its completed steps."""

import datetime as dt
import uuid
from typing import Any

from sqlalchemy import BigInteger, ForeignKey, Identity, Index, func, text
from sqlalchemy.orm import Mapped, mapped_column

from app.auth.models import ApiKey
from app.db.base import Base, new_id


class Job(Base):
    """One accepted request. ``state`` is changed by :mod:`app.jobs.transitions` alone.

    ``attempt`` is the fencing token: it grows by one with every claim, and every write of a worker names its own.
    ``lease_expires_at`` is set while a worker owns the job. ``version`` grows with every visible change (ETag).
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
    model_id: Mapped[str]
    method: Mapped[str]
    labels: Mapped[dict[str, str]] = mapped_column(default=dict)
    request_id: Mapped[str | None]
    """Of the HTTP request that made it, as its log lines have it."""

    attempt: Mapped[int] = mapped_column(default=0)
    failures: Mapped[int] = mapped_column(default=0)
    worker: Mapped[str | None]
    lease_expires_at: Mapped[dt.datetime | None]
    dispatched_at: Mapped[dt.datetime | None]
    not_before: Mapped[dt.datetime | None]
    pause_requested: Mapped[bool] = mapped_column(default=False)
    may_be_published: Mapped[bool] = mapped_column(default=False)
    """Publishing began in some attempt: a commit of this job's may be on the Hub."""

    hub_token: Mapped[bytes | None] = mapped_column(deferred=True)
    """The request's, encrypted (see :mod:`app.auth.vault`); gone when the job has succeeded."""

    progress: Mapped[dict[str, Any] | None]
    error: Mapped[dict[str, Any] | None]
    result: Mapped[dict[str, Any] | None]
    report: Mapped[dict[str, Any] | None]

    created_at: Mapped[dt.datetime] = mapped_column(server_default=func.now())
    updated_at: Mapped[dt.datetime] = mapped_column(server_default=func.now(), onupdate=func.now())
    started_at: Mapped[dt.datetime | None]
    finished_at: Mapped[dt.datetime | None]


class JobEvent(Base):
    """Something that happened; ``id`` is the cursor of the event stream."""

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
    """A completed step: the checkpoint that a later attempt resumes from. Step 0 is the baseline, the unpruned model measured."""

    __tablename__ = "job_steps"
    __table_args__ = (Index("ix_job_steps_created_at", "created_at"),)

    job_id: Mapped[uuid.UUID] = mapped_column(ForeignKey("jobs.id", ondelete="CASCADE"), primary_key=True)
    number: Mapped[int] = mapped_column(primary_key=True)
    attempt: Mapped[int]
    path: Mapped[str]
    """Checkpoint file, relative to the job's folder."""
    sha256: Mapped[str]
    data: Mapped[dict[str, Any]]
    created_at: Mapped[dt.datetime] = mapped_column(server_default=func.now())
