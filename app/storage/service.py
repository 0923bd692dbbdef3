"""The rules of stored files: where the files of a job lie, and the proof that all processes use the same store."""

import uuid

from sqlalchemy.orm import Session

from app.storage import repository
from app.storage.store import ObjectMissing, Store

MARKER = "secateur-storage"
"""Key of the object that holds the identity of the store."""
MARKER_BYTES = 100
DELETIONS_AT_ONCE = 100


class StorageMismatch(Exception):
    """This process does not use the object store of the database; the message says why and what to do."""


class NotJoined(StorageMismatch):
    """No process has joined the object store yet, so that the database does not know it."""


def job_folder(job_id: object) -> str:
    """Return the folder of the store with everything that belongs to a job."""
    return f"jobs/{job_id}/"


def artifacts_folder(job_id: object, attempt: int) -> str:
    """Return the folder of the store with the pruned model's files that an attempt stored."""
    return f"{job_folder(job_id)}artifacts/{attempt}/"


def tensors_folder(job_id: object) -> str:
    """Return the folder of the store with the tensors of a job's checkpoints."""
    return f"{job_folder(job_id)}tensors/"


def dataset_folder(owner_id: object, dataset_id: object) -> str:
    """Return the folder of the store with the content of a data set of an API key."""
    return f"datasets/{owner_id}/{dataset_id}/"


def join(session: Session, store: Store) -> None:
    """Prove that ``store`` is the store of this database; the first process marks the store; commits.

    The mark is an object of the store that holds the same random id as the database. A process on another machine whose
    ``file://`` store is a folder of its own finds no mark there.

    Raises:
        StorageMismatch: the store has no mark, or the mark of another service.
        PruningError: ``storage_unavailable``.
    """
    recorded, found = repository.lock_identity(session), _mark(store)
    if recorded is None:
        if found is None:
            found = str(uuid.uuid4())
            store.create(MARKER, found.encode())
        repository.record_identity(session, found)
    elif found != recorded:
        session.rollback()
        raise StorageMismatch(_difference(store, recorded, found))
    session.commit()


def check(session: Session, store: Store) -> None:
    """Check that ``store`` is the store of this database, without marking it.

    Raises:
        NotJoined: no process has joined the store yet.
        StorageMismatch: the store has no mark, or the mark of another service.
        PruningError: ``storage_unavailable``.
    """
    recorded, found = repository.identity(session), _mark(store)
    if recorded is None:
        raise NotJoined("no worker and no scheduler has joined it yet")
    if found != recorded:
        raise StorageMismatch(_difference(store, recorded, found))


def _mark(store: Store) -> str | None:
    try:
        return store.read(MARKER, MARKER_BYTES).decode()
    except ObjectMissing:
        return None


def _difference(store: Store, recorded: str, found: str | None) -> str:
    has = "has no mark" if found is None else f"has the mark {found}"
    return (
        f"The storage {store.url} {has}, but the database's storage has the mark {recorded}: this process and the others "
        "do not use the same storage. Set SECATEUR_STORAGE_URL to the same object store or shared folder on every machine; "
        f"after moving the files of the old storage, move the object '{MARKER}' with them."
    )


def delete_requested(session: Session, store: Store) -> None:
    """Delete the folders of the store whose deletion was requested.

    Raises:
        PruningError: ``storage_unavailable``: the remaining folders stay requested.
    """
    for folder in repository.requested_deletions(session, DELETIONS_AT_ONCE):
        store.delete_folder(folder)
        repository.deleted(session, folder)
