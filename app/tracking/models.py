"""The database table that serves as the outbox of MLflow."""

import datetime as dt
import uuid

from sqlalchemy import BigInteger, ForeignKey, Index, func, text
from sqlalchemy.orm import Mapped, mapped_column

from app.db.base import Base


class TrackedRun(Base):
    """The run of MLflow that stands for a job. Each event of the job makes the run due, in the event's transaction."""

    __tablename__ = "tracked_runs"
    __table_args__ = (Index("ix_tracked_runs_due_at", "due_at", postgresql_where=text("due_at IS NOT NULL")),)

    job_id: Mapped[uuid.UUID] = mapped_column(ForeignKey("jobs.id", ondelete="CASCADE"), primary_key=True)
    run_id: Mapped[str | None]
    """MLflow's id of the run; ``None`` until the run is created."""
    last_event: Mapped[int] = mapped_column(BigInteger, default=0, server_default="0")
    """Id of the newest event that MLflow was told of."""
    due_at: Mapped[dt.datetime | None] = mapped_column(server_default=func.now())
    """Time from which MLflow is to be told of the job; ``None`` if it knows all."""
