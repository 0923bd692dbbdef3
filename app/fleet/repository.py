"""Heartbeats of processes, and what live workers offer. The database's clock sets all times."""

import datetime as dt
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Row, delete, func, select, update
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.orm import Session

from app.fleet.models import Worker
from secateur.contract.workers import Drain


@dataclass(frozen=True)
class Offer:
    """What a worker offers to a job: its labels, and the memory of its device in bytes, ``None`` if it is not known."""

    labels: Mapping[str, str]
    memory_bytes: int | None
    device: str | None


def offer(worker: Worker) -> Offer:
    """Return what the worker offers to a job, as its last heartbeat says."""
    info = worker.info
    return Offer(info.get("labels", {}), info.get("memory_bytes"), info.get("device"))


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


def offers(session: Session, within_seconds: float) -> list[Offer]:
    """Return what the live workers offer that are not drained."""
    return [offer(worker) for worker in live(session, within_seconds) if worker.drain is None]


def get(session: Session, name: str) -> Worker | None:
    """Return the worker ``name``, live or not, or ``None`` if it never sent a heartbeat or signed off."""
    return session.scalars(select(Worker).where(Worker.name == name, Worker.kind == "worker")).one_or_none()


def every(session: Session, within_seconds: float) -> Sequence[Row[Worker, bool]]:
    """Return each worker, ordered by name, with whether it sent a heartbeat within the last ``within_seconds``."""
    is_live = Worker.last_seen_at > func.now() - dt.timedelta(seconds=within_seconds)
    return session.execute(select(Worker, is_live).where(Worker.kind == "worker").order_by(Worker.name)).all()


def set_drain(session: Session, name: str, drain: Drain | None) -> bool:
    """Drain the worker ``name``, or with ``None`` let it take jobs again; return whether it exists; the caller commits."""
    query = (
        update(Worker).where(Worker.name == name, Worker.kind == "worker").values(drain=drain).returning(Worker.name)
    )
    return session.scalar(query) is not None


def must_release(session: Session, name: str | None) -> bool:
    """Return whether the worker ``name`` shall release its job at the end of its step."""
    return session.scalar(select(Worker.drain).where(Worker.name == name)) == Drain.RELEASE


def leave(session: Session, name: str) -> None:
    """Record that the process ``name`` ends; commits."""
    session.execute(delete(Worker).where(Worker.name == name))
    session.commit()


def delete_silent(session: Session, silent_seconds: float) -> None:
    """Delete the rows of processes that sent no heartbeat for ``silent_seconds``; commits."""
    session.execute(delete(Worker).where(Worker.last_seen_at < func.now() - dt.timedelta(seconds=silent_seconds)))
    session.commit()
