"""Queries on the tables of stored files."""

import uuid
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from sqlalchemy import delete, func, select
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.orm import Session

from app.storage.models import Deletion, StorageIdentity, StoredFile

IDENTITY_LOCK = 0x5EC47E03
"""Key of the advisory lock that lets one process at a time record the identity of the store."""


def files(session: Session, job_id: uuid.UUID) -> Sequence[StoredFile]:
    """Return the stored files of a job, by name."""
    return session.scalars(select(StoredFile).where(StoredFile.job_id == job_id).order_by(StoredFile.name)).all()


def file(session: Session, job_id: uuid.UUID, name: str) -> StoredFile | None:
    """Return a stored file of a job, or ``None``."""
    return session.get(StoredFile, (job_id, name))


def record(session: Session, owner_id: uuid.UUID, job_id: uuid.UUID, found: Iterable[Mapping[str, Any]]) -> None:
    """Record the complete list of a job's stored files, {name, key, size, sha256}; the caller commits."""
    forget(session, [job_id])
    rows = [{"job_id": job_id, "owner_id": owner_id, **each} for each in found]
    if rows:
        session.execute(insert(StoredFile), rows)


def forget(session: Session, job_ids: Sequence[uuid.UUID]) -> None:
    """Delete the records of the jobs' stored files; the caller commits."""
    session.execute(delete(StoredFile).where(StoredFile.job_id.in_(job_ids)))


def bytes_of(session: Session, owner_id: uuid.UUID) -> int:
    """Return the number of bytes of all stored files of an API key."""
    total = session.scalar(select(func.coalesce(func.sum(StoredFile.size), 0)).where(StoredFile.owner_id == owner_id))
    return int(total or 0)


def request_deletion(session: Session, folders: Iterable[str]) -> None:
    """Record folders of the store that are to be deleted; the caller commits."""
    rows = [{"folder": folder} for folder in folders]
    if rows:
        session.execute(insert(Deletion).on_conflict_do_nothing(), rows)


def requested_deletions(session: Session, limit: int) -> Sequence[str]:
    """Return up to ``limit`` folders that are to be deleted, oldest request first."""
    return session.scalars(select(Deletion.folder).order_by(Deletion.created_at).limit(limit)).all()


def deleted(session: Session, folder: str) -> None:
    """Record that a folder is gone; commits."""
    session.execute(delete(Deletion).where(Deletion.folder == folder))
    session.commit()


def lock_identity(session: Session) -> str | None:
    """Return the recorded identity of the store, or ``None``; other processes wait until the transaction ends."""
    session.execute(select(func.pg_advisory_xact_lock(IDENTITY_LOCK)))
    return session.scalar(select(StorageIdentity.storage_id))


def identity(session: Session) -> str | None:
    """Return the recorded identity of the store, or ``None``."""
    return session.scalar(select(StorageIdentity.storage_id))


def record_identity(session: Session, storage_id: str) -> None:
    """Record the identity of the store; the caller commits."""
    session.add(StorageIdentity(storage_id=storage_id))
