"""What is known of an unpruned model on given tokens, kept for other targets of the job and for later jobs."""

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
"""In the folder; the least recently used go."""
ABANDONED_AFTER = 3600.0
"""Seconds after which a file that is half written has nobody who writes it."""


class Statistics:
    """Lists of tensors by name, in memory and, with a ``folder``, on disk as far as it can be written and read.

    ``key`` is all that they depend on.
    """

    def __init__(self, folder: Path | None, key: dict[str, Any]) -> None:
        self._folder = folder
        self._digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:32]
        self._known: dict[str, list[Tensor]] = {}

    def get(self, name: str, compute: Callable[[], list[Tensor]]) -> list[Tensor]:
        """What was kept under ``name``, or what ``compute`` finds now. On the CPU."""
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
    except OSError as error:  # the disk is full, say: the job can do without
        log.warning("the statistics %s are not kept: %s", path.name, error)


def _delete_old_files(folder: Path) -> None:
    """Other jobs may write and remove files there at the same time."""
    used: dict[Path, float] = {}
    for file in folder.iterdir():
        with suppress(FileNotFoundError):
            used[file] = file.stat().st_mtime
    abandoned = [file for file, at in used.items() if file.suffix == TEMPORARY and at < time.time() - ABANDONED_AFTER]
    kept = sorted((file for file in used if file.suffix == ".safetensors"), key=used.__getitem__)
    for file in [*abandoned, *kept[:-MOST_FILES]]:
        file.unlink(missing_ok=True)
