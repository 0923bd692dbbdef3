"""Usage of API keys by day; the transaction that changes a job also counts the change, and deleting a job undoes nothing.

The database's clock sets all times, and days are days of UTC.
"""

import datetime as dt
import uuid
from collections.abc import Sequence
from typing import Any

from sqlalchemy import BigInteger, Float, Row, cast, func, literal, select
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.orm import Mapped, Session, mapped_column

from app.db.base import Base
from app.jobs.models import Job


class Usage(Base):
    """What one API key used on one day.

    The key is no foreign key: its check would lock the key's row, which other transactions lock before this row.
    """

    __tablename__ = "usage"

    key_id: Mapped[uuid.UUID] = mapped_column(primary_key=True)
    day: Mapped[dt.date] = mapped_column(primary_key=True, index=True)
    jobs_created: Mapped[int]
    jobs_succeeded: Mapped[int]
    jobs_failed: Mapped[int]
    worker_seconds: Mapped[float]
    bytes_stored: Mapped[int] = mapped_column(BigInteger)


COUNTS = ("jobs_created", "jobs_succeeded", "jobs_failed", "worker_seconds", "bytes_stored")
TODAY = cast(func.timezone("UTC", func.now()), Usage.day.type)


def count(session: Session, key_id: uuid.UUID, **amounts: Any) -> None:
    """Add ``amounts``, by the names in :data:`COUNTS`, to the key's usage of today; the caller commits."""
    values = {name: amounts.get(name, literal(0)) for name in COUNTS}
    row = insert(Usage).values(key_id=key_id, day=TODAY, **values)
    sums = {name: getattr(Usage, name) + getattr(row.excluded, name) for name in amounts}
    session.execute(row.on_conflict_do_update(index_elements=["key_id", "day"], set_=sums))


def attempt_seconds(job: Job) -> Any:
    """Return an expression for the seconds for which the job's last attempt has owned the job, to its lease's end at most."""
    until = func.least(func.now(), Job.lease_expires_at)
    seconds = func.greatest(cast(func.extract("epoch", until - Job.claimed_at), Float), 0.0)
    return select(func.coalesce(seconds, 0.0)).where(Job.id == job.id).scalar_subquery()


def by_day(session: Session, key_id: uuid.UUID | None, since: dt.date) -> Sequence[Usage]:
    """Return the usage of one API key, or of all keys if ``key_id`` is ``None``, from the day ``since`` on, newest first."""
    query = select(Usage).where(Usage.day >= since).order_by(Usage.day.desc(), Usage.key_id)
    return session.scalars(query if key_id is None else query.where(Usage.key_id == key_id)).all()


def totals(session: Session) -> Sequence[Row[Any]]:
    """Return for each API key its ``key_id`` and the sums of its usage, by the names in :data:`COUNTS`."""
    sums = [func.sum(getattr(Usage, name)).label(name) for name in COUNTS]
    return session.execute(select(Usage.key_id, *sums).group_by(Usage.key_id)).all()
