"""The rules of data sets. A data set belongs to the API key that uploaded it, and only that key's jobs may name it.

A data set that an open job names cannot be deleted: the job may be on its way to another worker, which fetches the data
set again. Locks on the API key's row keep a job's creation and the deletion of its data set apart.
"""

import datetime as dt
import errno
import logging
import uuid
from collections.abc import AsyncIterator, Mapping, Sequence
from tempfile import TemporaryFile
from typing import Any, BinaryIO

from anyio import CapacityLimiter, to_thread
from fastapi.concurrency import run_in_threadpool
from sqlalchemy.orm import Session

from app.auth import repository as keys
from app.auth.service import Caller
from app.config import Settings
from app.datasets import repository
from app.datasets.content import Content
from app.datasets.models import Dataset
from app.db.base import new_id
from app.db.session import session_factory
from app.http.problem import Problem, invalid
from app.jobs import repository as jobs
from app.jobs import usage
from app.storage import repository as storage
from app.storage.service import dataset_folder
from app.storage.store import open_store
from secateur.catalog.sources import UPLOAD_PREFIX
from secateur.contract.errors import ErrorCode, PruningError

log = logging.getLogger(__name__)

PIECE = 2**20
"""Number of bytes that are checked in one piece."""
LONGEST_UPLOAD = dt.timedelta(days=1)
"""Time after which the content of an upload that was not completed is deleted from the object store."""
JOBS_SHOWN = 3
_checkers = CapacityLimiter(2)  # more threads would leave the event loop too small a share of the interpreter's lock


async def upload(
    settings: Settings, owner_id: uuid.UUID, name: str, declared: int, chunks: AsyncIterator[bytes], content: Content
) -> Dataset:
    """Check and store a data set while it arrives; ``declared`` is its number of bytes, or 0 if that is not known.

    The content waits in a file without a name, which is gone when this process ends.

    Raises:
        Problem: 401 if the key was revoked meanwhile, 403 if the key may not store as many bytes, 422 if the content is
            not what ``content`` allows.
        PruningError: ``storage_unavailable``, ``disk_full``.
    """
    await run_in_threadpool(_look_for_room, settings, owner_id, declared)
    try:
        settings.data_dir.mkdir(parents=True, exist_ok=True)
        with TemporaryFile(dir=settings.data_dir) as file:

            def take(piece: bytes) -> None:
                content.feed(piece)
                file.write(piece)

            piece = bytearray()
            async for chunk in chunks:
                piece += chunk
                if len(piece) >= PIECE:
                    await to_thread.run_sync(take, bytes(piece), limiter=_checkers)
                    piece.clear()
            await to_thread.run_sync(take, bytes(piece), limiter=_checkers)
            content.close()
            return await run_in_threadpool(_store, settings, owner_id, name, file, content)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise PruningError(ErrorCode.DISK_FULL, "The service's disk has no room for the data set.") from error


def _look_for_room(settings: Settings, owner_id: uuid.UUID, size: int) -> None:
    with session_factory()() as session:
        _check_room(session, settings, owner_id, size)


def _store(settings: Settings, owner_id: uuid.UUID, name: str, file: BinaryIO, content: Content) -> Dataset:
    size = file.tell()
    file.seek(0)
    dataset_id = new_id()
    folder = dataset_folder(owner_id, dataset_id)
    with session_factory()() as session:
        _check_room(session, settings, owner_id, size)
        storage.request_deletion(session, [folder], after=LONGEST_UPLOAD)
        session.commit()
    key = f"{folder}content"
    digest = open_store(settings).put(file, key)
    with session_factory()() as session:
        _check_room(session, settings, owner_id, size)
        storage.withdraw_deletion(session, folder)
        dataset = Dataset(
            id=dataset_id,
            owner_id=owner_id,
            name=name,
            kind=content.kind,
            size=digest.size,
            lines=content.lines,
            sha256=digest.sha256,
            key=key,
        )
        session.add(dataset)
        usage.count(session, owner_id, bytes_stored=digest.size)
        session.commit()
        return dataset


def _check_room(session: Session, settings: Settings, owner_id: uuid.UUID, size: int) -> None:
    """Check that the API key may store ``size`` more bytes; other requests of the key wait until the transaction ends.

    Raises:
        Problem: 401 if the key was revoked meanwhile, 403 if it may not.
    """
    key = keys.lock(session, owner_id)
    if key is None or key.revoked_at is not None:
        raise Problem(401, ErrorCode.UNAUTHORIZED, "This API key was revoked.", headers={"WWW-Authenticate": "Bearer"})
    largest = settings.max_stored_bytes
    if largest is not None and (stored := storage.bytes_of(session, owner_id)) + size > largest:
        detail = (
            f"The artifacts and data sets of this API key have {stored:,} bytes and this data set has {size:,}; {largest:,} are "
            "allowed together. Delete jobs or data sets."
        )
        raise Problem(403, ErrorCode.STORAGE_QUOTA_EXCEEDED, detail)


def get(session: Session, caller: Caller, dataset_id: uuid.UUID) -> Dataset:
    """Return a data set of the caller's API key; a caller with the scope ``admin`` sees those of all keys.

    Raises:
        Problem: 404 if the data set does not exist or the caller does not see it.
    """
    dataset = repository.get(session, None if caller.is_admin else caller.id, dataset_id)
    if dataset is None:
        raise Problem(404, ErrorCode.NOT_FOUND, f"There is no data set {dataset_id}.")
    return dataset


def page(
    session: Session, owner_id: uuid.UUID | None, before: uuid.UUID | None, size: int
) -> tuple[Sequence[Dataset], uuid.UUID | None]:
    """Return up to ``size`` of the owner's data sets, newest first, and the cursor of the next page if there is one."""
    found = repository.newest(session, owner_id, before, size + 1)
    return found[:size], found[size - 1].id if len(found) > size else None


def delete(session: Session, caller: Caller, dataset_id: uuid.UUID) -> None:
    """Delete a data set; commits. A log line records the deletion of another key's data set.

    The scheduler then deletes the content in the object store.

    Raises:
        Problem: 404 if the data set does not exist or the caller does not see it, 409 if a job that has not ended names
            it.
    """
    owner_id = get(session, caller, dataset_id).owner_id
    keys.lock(session, owner_id)
    session.expire_all()
    dataset = get(session, caller, dataset_id)
    if users := jobs.open_with_dataset(session, owner_id, f"{UPLOAD_PREFIX}{dataset_id}", JOBS_SHOWN):
        named = ", ".join(str(job_id) for job_id in users)
        detail = f"Jobs that have not ended name the data set, such as {named}."
        raise Problem(409, ErrorCode.DATASET_IN_USE, detail)
    storage.request_deletion(session, [dataset_folder(owner_id, dataset_id)])
    session.delete(dataset)
    session.commit()
    if caller.id != owner_id:
        log.warning("audit: admin key %s deleted data set %s of key %s", caller.id, dataset_id, owner_id)


def find(session: Session, owner_id: uuid.UUID, named: Mapping[str, str]) -> list[Dataset]:
    """Return the data sets of the API key that a request names; ``named`` has the id by the field that names it.

    Raises:
        Problem: 422 ``text_not_found`` if the API key has no such data set.
    """
    ids = {text: dataset_id for text in named.values() if (dataset_id := _id(text)) is not None}
    known = {str(dataset.id): dataset for dataset in repository.found(session, owner_id, ids.values())}
    for field, text in named.items():
        if text not in known:
            message = f"there is no data set '{UPLOAD_PREFIX}{text}'"
            allowed = "a data set of this API key, see GET /v1/datasets"
            raise invalid(field, message, code=ErrorCode.TEXT_NOT_FOUND, allowed=allowed)
    return list(known.values())


def _id(text: str) -> uuid.UUID | None:
    try:
        return uuid.UUID(text)
    except ValueError:
        return None


def describe(dataset: Dataset) -> dict[str, Any]:
    """Return what a worker needs to fetch the data set: the file's name, and the object's key and SHA-256 hash."""
    suffix = ".txt" if dataset.kind == "text" else ".jsonl"
    return {"file": f"{dataset.id}{suffix}", "key": dataset.key, "sha256": dataset.sha256}
