"""Functions that write a file completely or not at all, and that compare its content."""

import hashlib
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

TEMPORARY = ".tmp"
"""The suffix of a file's name while the file is written; a killed process leaves a file with this suffix."""


def write_whole(path: Path, content: bytes) -> None:
    """Write ``content`` to a temporary file beside ``path``, then rename the file to ``path``.

    A reader of ``path`` finds all of ``content`` or the previous content, even after a power cut.

    Raises:
        OSError: The file cannot be written; nothing was changed.
    """
    with written_whole(path) as temporary:
        temporary.write_bytes(content)


@contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """Yield the path of a temporary file beside ``path``, which the caller writes; it is then renamed to ``path``.

    A reader of ``path`` finds all of the new content or the previous content, even after a power cut. After an error,
    the temporary file is deleted.
    """
    temporary = path.with_name(f"{path.name}.{uuid.uuid4().hex}{TEMPORARY}")
    try:
        yield temporary
        sync(temporary)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    sync(path.parent)


def sha256(path: Path) -> str:
    """Return the SHA-256 hash of a file's content, in hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sync(path: Path) -> None:
    """Make the system write a file, or the names in a folder, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def link_or_copy(source: str, target: str) -> None:
    """Make ``target`` a hard link to ``source``, or a copy where links are not possible; a function for :func:`shutil.copytree`."""
    try:
        os.link(source, target)
    except OSError:  # the target is on another file system, or the file system has no links
        shutil.copy2(source, target)
