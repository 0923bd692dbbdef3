"""A cache of statistics of an unpruned model on given tokens.

The cache serves the other targets of the same job and later jobs.
"""

import hashlib
import json
import logging
import os
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from secateur.files import TEMPORARY, write_whole

log = logging.getLogger(__name__)

MOST_FILES = 256
"""Number of files that the folder may hold; the least recently used files are deleted."""
ABANDONED_AFTER = 3600.0
"""Age in seconds after which an incomplete file is deleted, because no process still writes it."""


class Statistics:
    """Lists of tensors by name, kept in memory and, with a ``folder``, on disk.

    ``key`` holds everything on which the tensors depend. Files that cannot be written or read are left out.
    """

    def __init__(self, folder: Path | None, key: dict[str, Any]) -> None:
        self._folder = folder
        self._digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:32]
        self._known: dict[str, list[Tensor]] = {}

    def get(self, name: str, compute: Callable[[], list[Tensor]]) -> list[Tensor]:
        """Return the tensors that were kept under ``name``, or else the result of ``compute``, which is kept.

        Tensors that are read from disk are on the CPU.
        """
        if name not in self._known:
            path = None if self._folder is None else self._folder / f"{self._digest}-{name}.safetensors"
            self._known[name] = (path and _read(path)) or compute()
            if path is not None:
                _keep(path, self._known[name])
        return self._known[name]


def _read(path: Path) -> list[Tensor] | None:
    try:
        tensors = load(path.read_bytes())
        os.utime(path)
    except OSError:
        return None
    except SafetensorError:
        path.unlink(missing_ok=True)
        return None
    return [tensors[str(index)] for index in range(len(tensors))]


def _keep(path: Path, tensors: list[Tensor]) -> None:
    try:
        if path.exists():
            return
        content = {str(index): tensor.detach().cpu().contiguous() for index, tensor in enumerate(tensors)}
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, save(content))
        _delete_old_files(path.parent)
    except OSError as error:  # for example, the disk is full; the job does not need the file
        log.warning("the statistics %s are not kept: %s", path.name, error)


def _delete_old_files(folder: Path) -> None:
    """Delete abandoned and old files of a folder in which other jobs may write and delete at the same time."""
    used: dict[Path, float] = {}
    for file in folder.iterdir():
        with suppress(FileNotFoundError):
            used[file] = file.stat().st_mtime
    abandoned = [file for file, at in used.items() if file.suffix == TEMPORARY and at < time.time() - ABANDONED_AFTER]
    kept = sorted((file for file in used if file.suffix == ".safetensors"), key=used.__getitem__)
    for file in [*abandoned, *kept[:-MOST_FILES]]:
        file.unlink(missing_ok=True)
