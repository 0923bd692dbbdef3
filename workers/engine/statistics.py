"""What is known of an unpruned model on given tokens, kept for other targets of the job and for later jobs."""

import hashlib
import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

MOST_FILES = 256
"""In the folder; the least recently used go."""


class Statistics:
    """Lists of tensors by name, in memory and, with a ``folder``, on disk. ``key`` is all that they depend on."""

    def __init__(self, folder: Path | None, key: dict[str, Any]) -> None:
        self._folder = folder
        self._digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:32]
        self._known: dict[str, list[Tensor]] = {}

    def get(self, name: str, compute: Callable[[], list[Tensor]]) -> list[Tensor]:
        """What was kept under ``name``, or what ``compute`` finds now. On the CPU."""
        if name not in self._known:
            path = None if self._folder is None else self._folder / f"{self._digest}-{name}.safetensors"
            self._known[name] = (path and _read(path)) or compute()
            if path is not None and not path.exists():
                _write(path, self._known[name])
        return self._known[name]


def _read(path: Path) -> list[Tensor] | None:
    try:
        tensors = load(path.read_bytes())
        os.utime(path)
    except FileNotFoundError:
        return None
    except SafetensorError:
        path.unlink(missing_ok=True)
        return None
    return [tensors[str(index)] for index in range(len(tensors))]


def _write(path: Path, tensors: list[Tensor]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    content = save({str(index): tensor.detach().cpu().contiguous() for index, tensor in enumerate(tensors)})
    with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
        file.write(content)
    Path(file.name).rename(path)
    files = sorted(path.parent.glob("*.safetensors"), key=lambda file: file.stat().st_mtime)
    for old in files[:-MOST_FILES]:
        old.unlink(missing_ok=True)
