"""Queries on the outbox of MLflow. The database's clock sets all times."""

import datetime as dt
import uuid
from collections.abc import Mapping, Sequence
from typing import Any

from sqlalchemy import case, func, null, select, update
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.orm import Session

from app.auth.models import ApiKey
from app.jobs.models import Job, JobEvent
from app.tracking.models import TrackedRun


def owe(session: Session, job_id: uuid.UUID) -> None:
    """Make the run of the job due, because something happened to the job; the caller commits."""
    due = {"due_at": func.now()}
    row = insert(TrackedRun).values(job_id=job_id, **due)
    session.execute(row.on_conflict_do_update(index_elements=["job_id"], set_=due))


def claim_due(session: Session, hold: float) -> TrackedRun | None:
    """Take the run that is due longest, or return ``None`` if no run is due; commits.

    The run is due again after ``hold`` seconds unless :func:`told` records that it was reported.
    """
    first = (
        select(TrackedRun.job_id)
        .where(TrackedRun.due_at <= func.now())
        .order_by(TrackedRun.due_at)
        .limit(1)
        .with_for_update(skip_locked=True)
    )
    later = {"due_at": func.now() + dt.timedelta(seconds=hold)}
    taken = update(TrackedRun).where(TrackedRun.job_id.in_(first)).values(later).returning(TrackedRun)
    run = session.scalars(taken, execution_options={"populate_existing": True}).one_or_none()
    session.commit()
    return run


def read(session: Session, run: TrackedRun) -> tuple[Job, str, Sequence[JobEvent]] | None:
    """Return the job, the name of its API key and its events since the last report, or ``None`` if it was deleted."""
    query = select(Job, ApiKey.name).join(ApiKey, ApiKey.id == Job.owner_id).where(Job.id == run.job_id)
    row = session.execute(query, execution_options={"populate_existing": True}).one_or_none()
    new = select(JobEvent).where(JobEvent.job_id == run.job_id, JobEvent.id > run.last_event)
    events = session.scalars(new.order_by(JobEvent.id)).all()
    session.rollback()
    return None if row is None else (row[0], row[1], events)


def told(session: Session, run: TrackedRun, known: Mapping[str, Any]) -> None:
    """Set the columns ``known`` of a claimed run, which is due no more unless it became due meanwhile. Commits."""
    due_at = case((TrackedRun.due_at == run.due_at, null()), else_=TrackedRun.due_at)
    session.execute(update(TrackedRun).where(TrackedRun.job_id == run.job_id).values(**known, due_at=due_at))
    session.commit()
