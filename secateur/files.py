"""Functions that write a file completely or not at all."""

import os
import shutil
import uuid
from pathlib import Path

TEMPORARY = ".tmp"
"""The suffix of a file's name while the file is written; a killed process leaves a file with this suffix."""


def write_whole(path: Path, content: bytes) -> None:
    """Write ``content`` to a temporary file beside ``path``, then rename the file to ``path``.

    A reader of ``path`` finds all of ``content`` or the previous content, even after a power cut.

    Raises:
        OSError: The file cannot be written; nothing was changed.
    """
    temporary = path.with_name(f"{path.name}.{uuid.uuid4().hex}{TEMPORARY}")
    try:
        with temporary.open("xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    sync(path.parent)


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
