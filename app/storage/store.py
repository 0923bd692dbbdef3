"""The object store of artifacts and checkpoints, named by a URL: ``file://``, ``s3://``, ``gs://`` or ``az://``.

The store uses the library obstore (the Rust crate ``object_store``), which uploads large files in parts, tries failed
requests again and signs URLs. The methods of :class:`Store` block.
"""

import datetime as dt
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO
from urllib.parse import unquote, urlsplit

import obstore
from obstore.exceptions import AlreadyExistsError, BaseError
from obstore.store import LocalStore, ObjectStore, from_url

from app.config import Settings
from secateur.contract.errors import ErrorCode, PruningError
from secateur.files import TEMPORARY, link_or_copy, sync

if TYPE_CHECKING:
    from obstore import GetOptions  # the module has this name for type checkers alone

CHUNK = 8 * 2**20
"""Number of bytes of a part of a multipart upload, and of a chunk of a download."""
CONNECT_SECONDS = 5
REQUEST_SECONDS = 60
RETRY_SECONDS = 120
DELETE_BATCH = 1000


class ObjectMissing(Exception):
    """The store has no object of this key."""


class ObjectDamaged(Exception):
    """An object's content differs from the content that was stored."""


@dataclass(frozen=True)
class Digest:
    """The size of a file in bytes and the SHA-256 hash of its content, in hexadecimal."""

    size: int
    sha256: str


@dataclass(frozen=True)
class Found:
    """An object in a listing; ``key`` is the object's key in the store."""

    key: str
    size: int
    modified: dt.datetime
    e_tag: str | None


class Store:
    """An object store. Keys are relative paths with ``/``; an object is visible only when it is complete.

    The methods that write files raise ``OSError`` when the disk is full.
    """

    def __init__(self, url: str, options: dict[str, Any]) -> None:
        """Open the store that ``url`` names; ``options`` are the configuration keys of obstore's store.

        No request is made. Keys that ``options`` lacks come from the provider's usual environment variables, such as
        ``AWS_ACCESS_KEY_ID`` and ``AWS_ENDPOINT_URL``.

        Raises:
            ValueError: the URL or an option is not valid.
        """
        self.url = url
        self.root: Path | None = None
        """The folder of a ``file://`` store."""
        parts = urlsplit(url)
        if parts.scheme == "file":
            self.root = Path(unquote(parts.path))
            self._store: ObjectStore = LocalStore(self.root, mkdir=True)
            return
        client = {"connect_timeout": f"{CONNECT_SECONDS}s", "timeout": f"{REQUEST_SECONDS}s"}
        if str(options.get("endpoint", "")).startswith("http://"):
            client["allow_http"] = "true"
        if parts.scheme == "s3":
            options = {"checksum_algorithm": "SHA256"} | options
        try:
            self._store = from_url(  # type: ignore[call-overload]
                url,
                client_options=client,
                retry_config={"max_retries": 10, "retry_timeout": dt.timedelta(seconds=RETRY_SECONDS)},
                **options,
            )
        except BaseError as error:
            raise ValueError(str(error).splitlines()[0]) from None

    def put_file(self, path: Path, key: str) -> Digest:
        """Store the file ``path`` under ``key`` and return the digest of its content.

        In a ``file://`` store on the same file system the object is a hard link to the file, which must therefore not
        be changed afterwards.

        Raises:
            PruningError: ``storage_unavailable``.
        """
        with path.open("rb") as file:
            if self.root is None:
                return self.put(file, key)
            digest = Digest(path.stat().st_size, hashlib.file_digest(file, "sha256").hexdigest())
        with _explained(self.url):
            _place(self.root / key, lambda temporary: link_or_copy(str(path), str(temporary)))
        return digest

    def put(self, file: BinaryIO, key: str) -> Digest:
        """Store what ``file`` contains from its position on under ``key``, and return the digest of that content.

        Raises:
            PruningError: ``storage_unavailable``.
        """
        hashed, size = hashlib.sha256(), 0

        def chunks() -> Iterator[bytes]:
            nonlocal size
            while chunk := file.read(CHUNK):
                hashed.update(chunk)
                size += len(chunk)
                yield chunk

        with _explained(self.url):
            obstore.put(self._store, key, chunks(), chunk_size=CHUNK)
        return Digest(size, hashed.hexdigest())

    def create(self, key: str, content: bytes) -> bool:
        """Store ``content`` under ``key`` if there is no such object; return whether it was stored.

        Raises:
            PruningError: ``storage_unavailable``.
        """
        with _explained(self.url):
            try:
                obstore.put(self._store, key, content, mode="create")
            except AlreadyExistsError:
                return False
        return True

    def get_file(self, key: str, path: Path, sha256: str | None = None) -> None:
        """Write the object ``key`` to the file ``path``, completely or not at all.

        Raises:
            ObjectMissing: the store has no such object.
            ObjectDamaged: the hash of the content is not ``sha256``, if that is given.
            PruningError: ``storage_unavailable``.
        """
        path.parent.mkdir(parents=True, exist_ok=True)
        hashed = hashlib.sha256()
        if self.root is not None:
            source = self.root / key
            with _explained(self.url):
                if not source.is_file():
                    raise ObjectMissing(key)
                _place(path, lambda temporary: link_or_copy(str(source), str(temporary)))
                with path.open("rb") as file:
                    hashed = hashlib.file_digest(file, "sha256")
        else:

            def write(temporary: Path) -> None:
                with temporary.open("xb") as file:
                    for chunk in self.stream(key):
                        hashed.update(chunk)
                        file.write(chunk)

            with _explained(self.url):
                _place(path, write)
        if sha256 is not None and hashed.hexdigest() != sha256:
            path.unlink()
            raise ObjectDamaged(key)

    def read(self, key: str, limit: int) -> bytes:
        """Return the content of an object of at most ``limit`` bytes.

        Raises:
            ObjectMissing: the store has no such object.
            ValueError: the object is larger than ``limit``.
            PruningError: ``storage_unavailable``.
        """
        with _explained(self.url):
            found = obstore.get(self._store, key)
            if found.meta["size"] > limit:
                raise ValueError(f"it has {found.meta['size']} bytes, more than {limit}")
            return bytes(found.bytes())

    def stream(self, key: str, start: int = 0, end: int | None = None) -> Iterator[bytes]:
        """Yield the content of an object from byte ``start`` up to, but not including, byte ``end``, in chunks.

        Raises:
            ObjectMissing: the store has no such object.
            PruningError: ``storage_unavailable``.
        """
        with _explained(self.url):
            options: GetOptions = {}
            if end is not None:
                options["range"] = (start, end)
            elif start:
                options["range"] = {"offset": start}
            found = obstore.get(self._store, key, options=options)
            for chunk in found.stream(min_chunk_size=CHUNK):
                yield bytes(chunk)

    def signed_url(self, key: str, seconds: float) -> str | None:
        """Return a URL from which anyone may read the object for ``seconds``; ``None`` if the store cannot sign URLs.

        Raises:
            PruningError: ``storage_unavailable``: the credentials cannot sign.
        """
        if self.root is not None:
            return None
        with _explained(self.url):
            signed: str = obstore.sign(self._store, "GET", key, dt.timedelta(seconds=seconds))  # type: ignore[call-overload]
            return signed

    def listing(self, prefix: str) -> Iterator[Found]:
        """Yield the objects whose keys begin with the folder ``prefix``, in no particular order.

        Raises:
            PruningError: ``storage_unavailable``.
        """
        with _explained(self.url):
            for batch in obstore.list(self._store, prefix.rstrip("/")):
                for item in batch:
                    yield Found(item["path"], item["size"], item["last_modified"], item["e_tag"])

    def delete(self, keys: list[str]) -> None:
        """Delete objects; objects that do not exist are ignored.

        Raises:
            PruningError: ``storage_unavailable``.
        """
        with _explained(self.url):
            for start in range(0, len(keys), DELETE_BATCH):
                if self.root is not None:
                    for key in keys[start : start + DELETE_BATCH]:
                        (self.root / key).unlink(missing_ok=True)
                else:
                    obstore.delete(self._store, keys[start : start + DELETE_BATCH])

    def delete_folder(self, prefix: str) -> None:
        """Delete all objects whose keys begin with the folder ``prefix``.

        Raises:
            PruningError: ``storage_unavailable``.
        """
        if self.root is not None:
            with _explained(self.url):
                if (self.root / prefix).exists():
                    shutil.rmtree(self.root / prefix)
        else:
            self.delete([found.key for found in self.listing(prefix)])


def _place(path: Path, write: Callable[[Path], None]) -> None:
    """Call ``write`` with a temporary path beside ``path``, then rename the result to ``path``."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{os.getpid()}{TEMPORARY}")
    temporary.unlink(missing_ok=True)
    try:
        write(temporary)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    sync(path.parent)


@contextmanager
def _explained(url: str) -> Iterator[None]:
    """Turn the errors of obstore into errors of this project."""
    try:
        yield
    except FileNotFoundError as error:
        raise ObjectMissing(str(error).splitlines()[0]) from None
    except BaseError as error:
        reason = str(error).splitlines()[0]
        scheme = url.partition(":")[0]
        message = f"The service's storage ({scheme}) does not answer as it should: {type(error).__name__}."
        raise PruningError(ErrorCode.STORAGE_UNAVAILABLE, message) from RuntimeError(reason)


def open_store(settings: Settings) -> Store:
    """Return the store that the settings name.

    Raises:
        ValueError: the URL or an option is not valid.
    """
    options = settings.storage_options.get_secret_value() if settings.storage_options else "{}"
    return _open(settings.nearest_storage_url(), options)


@lru_cache
def _open(url: str, options: str) -> Store:
    return Store(url, json.loads(options))
