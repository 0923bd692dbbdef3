"""Queries on the tables of stored files."""

import datetime as dt
import uuid
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from sqlalchemy import delete, func, select
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.orm import Session

from app.datasets.models import Dataset
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
    """Return the number of bytes of all stored files and data sets of an API key."""
    sums = (
        select(func.coalesce(func.sum(table.size), 0)).where(table.owner_id == owner_id).scalar_subquery()
        for table in (StoredFile, Dataset)
    )
    return sum(int(total) for total in session.execute(select(*sums)).one())


def request_deletion(session: Session, folders: Iterable[str], after: dt.timedelta = dt.timedelta()) -> None:
    """Record folders of the store that are to be deleted when ``after`` has passed; the caller commits.

    A folder that is requested before it is written, and withdrawn with the record of its content, cannot be forgotten.
    """
    rows = [{"folder": folder, "due_at": func.now() + after} for folder in folders]
    if rows:
        session.execute(insert(Deletion).values(rows).on_conflict_do_nothing())


def withdraw_deletion(session: Session, folder: str) -> None:
    """Keep a folder whose deletion was requested; the caller commits."""
    session.execute(delete(Deletion).where(Deletion.folder == folder))


def requested_deletions(session: Session, limit: int) -> Sequence[str]:
    """Return up to ``limit`` folders that are to be deleted now, oldest request first."""
    due = select(Deletion.folder).where(Deletion.due_at <= func.now())
    return session.scalars(due.order_by(Deletion.due_at).limit(limit)).all()


def deleted(session: Session, folder: str) -> None:
    """Record that a folder is gone; commits."""
    withdraw_deletion(session, folder)
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
