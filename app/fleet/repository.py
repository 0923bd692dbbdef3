"""Heartbeats of processes: recording them and finding live processes. The database's clock sets all times."""

import datetime as dt
from collections.abc import Sequence
from typing import Any

from sqlalchemy import delete, func, select
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.orm import Session

from app.fleet.models import Worker


def beat(session: Session, name: str, kind: str, info: dict[str, Any]) -> None:
    """Record a heartbeat of the process ``name`` of ``kind``; ``name`` is unique, for example host and pid; commits."""
    row = insert(Worker).values(name=name, kind=kind, info=info)
    seen = {"kind": kind, "info": info, "last_seen_at": func.now()}
    session.execute(row.on_conflict_do_update(index_elements=["name"], set_=seen))
    session.commit()


def live(session: Session, within_seconds: float, kind: str = "worker") -> Sequence[Worker]:
    """Return the processes of ``kind`` that sent a heartbeat within the last ``within_seconds``, ordered by name."""
    since = func.now() - dt.timedelta(seconds=within_seconds)
    return session.scalars(
        select(Worker).where(Worker.kind == kind, Worker.last_seen_at > since).order_by(Worker.name)
    ).all()


def largest(session: Session, within_seconds: float) -> tuple[int, str] | None:
    """Return the largest memory of a live worker, in bytes, and its device; ``None`` if no live worker reports any."""
    known = [worker.info for worker in live(session, within_seconds) if "memory_bytes" in worker.info]
    return max(((int(info["memory_bytes"]), str(info["device"])) for info in known), default=None)


def leave(session: Session, name: str) -> None:
    """Record that the process ``name`` ends; commits."""
    session.execute(delete(Worker).where(Worker.name == name))
    session.commit()


def delete_silent(session: Session, silent_seconds: float) -> None:
    """Delete the rows of processes that sent no heartbeat for ``silent_seconds``; commits."""
    session.execute(delete(Worker).where(Worker.last_seen_at < func.now() - dt.timedelta(seconds=silent_seconds)))
    session.commit()
