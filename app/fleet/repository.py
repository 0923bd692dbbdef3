"""Who is alive: heartbeats of workers, and the question whether any is there. All times are the database's clock."""

import datetime as dt
from collections.abc import Sequence
from typing import Any

from sqlalchemy import delete, func, select
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.orm import Session

from app.fleet.models import Worker


def beat(session: Session, name: str, kind: str, info: dict[str, Any]) -> None:
    """Say that the process ``name`` (unique: host and pid, say) of ``kind`` is alive; commits."""
    row = insert(Worker).values(name=name, kind=kind, info=info)
    seen = {"kind": kind, "info": info, "last_seen_at": func.now()}
    session.execute(row.on_conflict_do_update(index_elements=["name"], set_=seen))
    session.commit()


def live(session: Session, within_seconds: float, kind: str = "worker") -> Sequence[Worker]:
    """The processes of ``kind`` that have beaten within the last ``within_seconds``, by name."""
    since = func.now() - dt.timedelta(seconds=within_seconds)
    return session.scalars(
        select(Worker).where(Worker.kind == kind, Worker.last_seen_at > since).order_by(Worker.name)
    ).all()


def largest(session: Session, within_seconds: float) -> tuple[int, str] | None:
    """The most memory that a live worker has, in bytes, and on which device; ``None`` when none is known."""
    known = [worker.info for worker in live(session, within_seconds) if "memory_bytes" in worker.info]
    return max(((int(info["memory_bytes"]), str(info["device"])) for info in known), default=None)


def leave(session: Session, name: str) -> None:
    """Say that the process ``name`` ends; commits."""
    session.execute(delete(Worker).where(Worker.name == name))
    session.commit()


def delete_silent(session: Session, silent_seconds: float) -> None:
    """Drop the rows of processes that have been silent for ``silent_seconds``; commits."""
    session.execute(delete(Worker).where(Worker.last_seen_at < func.now() - dt.timedelta(seconds=silent_seconds)))
    session.commit()
