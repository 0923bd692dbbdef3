"""Files that are written whole or not at all."""

import os
import uuid
from pathlib import Path

TEMPORARY = ".tmp"
"""The end of a file's name while it is being written; a kill leaves it there."""


def write_whole(path: Path, content: bytes) -> None:
    """Write beside ``path``, then rename: whoever reads it, even after a power cut, finds all of ``content`` or what was there.

    Raises:
        OSError: nothing was changed.
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
    """Have the system write a file, or the names in a folder, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
