"""The rules of the fleet: which workers there are, which of them are idle, and how an operator drains one."""

from sqlalchemy.orm import Session

from app.config import Settings
from app.fleet import repository
from app.fleet.repository import Offer
from app.jobs import repository as jobs
from secateur.contract.workers import Drain, WorkerView

SHOWN = ("device", "memory_bytes", "host_memory_bytes", "disk_free_bytes")
"""What a heartbeat tells of a worker's hardware, by the names of :class:`WorkerView`."""


class UnknownWorker(Exception):
    """There is no worker of this name."""


def every(session: Session, settings: Settings) -> list[WorkerView]:
    """Return the workers, ordered by name, with the jobs that they work on."""
    working = jobs.owned_by_worker(session)
    return [
        WorkerView(
            name=worker.name,
            live=is_live,
            drain=None if worker.drain is None else Drain(worker.drain),
            job_id=working.get(worker.name),
            labels=worker.info.get("labels", {}),
            started_at=worker.started_at,
            last_seen_at=worker.last_seen_at,
            **{name: worker.info.get(name) for name in SHOWN},
        )
        for worker, is_live in repository.every(session, settings.worker_silence)
    ]


def set_drain(session: Session, name: str, drain: Drain | None) -> None:
    """Drain the worker ``name``, or with ``None`` let it take jobs again; idempotent; commits.

    Raises:
        UnknownWorker: there is no worker ``name``.
    """
    if not repository.set_drain(session, name, drain):
        session.rollback()
        raise UnknownWorker(name)
    session.commit()


def idle(session: Session, settings: Settings) -> list[Offer]:
    """Return what those live workers offer that work on no job and are not drained."""
    working = jobs.owned_by_worker(session)
    workers = repository.live(session, settings.worker_silence)
    return [repository.offer(worker) for worker in workers if worker.drain is None and worker.name not in working]
