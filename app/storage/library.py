"""The operator's models, texts and tasks (``local:NAME``) in an object store, and their copies on this machine's disk.

Without ``SECATEUR_STORAGE_URL``, and with a ``file://`` store, the files are used where they lie. With any other store,
``models/NAME/``, ``texts/NAME`` and ``tasks/NAME.jsonl`` are copied when they are needed.
"""

import datetime as dt
import hashlib
import os
import shutil
import struct
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from app.config import Settings
from app.storage.store import Found, Store, open_store
from secateur.catalog.sources import LOCAL_PREFIX

SAFETENSORS_HEADER = 100 * 2**20
"""Largest header of a safetensors file, in bytes (the limit of the format's reference implementation)."""
GGUF_HEADER = 64 * 2**20
"""Number of bytes from the start of a GGUF file in which its header is expected."""
UNUSED_SECONDS = 7 * 86_400.0
FOLDERS = ("models", "texts", "tasks")


@dataclass(frozen=True)
class Library:
    """The folders in which this machine has the operator's models, texts and tasks."""

    models_dir: Path
    texts_dir: Path
    tasks_dir: Path


def open_library(settings: Settings, *names: str, outline: bool = False) -> Library:
    """Return folders that contain what ``names`` (paths such as ``models/NAME`` or ``texts/NAME``) name in the library.

    With ``outline``, weight files contain only their headers, and the rest is zeros that take no room: enough to check a
    request, without a download of the weights.

    Raises:
        PruningError: ``storage_unavailable``.
    """
    if settings.storage_url is None:
        return Library(settings.models_dir, settings.texts_dir, settings.tasks_dir)
    store = open_store(settings)
    if store.root is not None:
        return Library(*(store.root / folder for folder in FOLDERS))
    root = settings.data_dir / ("outlines" if outline else "library")
    digest = hashlib.sha256()
    found = [each for name in names for each in _files(store, name)]
    for each in found:
        digest.update(f"{each.key} {each.size} {each.e_tag}\n".encode())
    copy = root / digest.hexdigest()[:16]
    if not copy.is_dir():
        _copy(store, found, copy, outline)
    copy.touch()
    return Library(*(copy / folder for folder in FOLDERS))


def library_names(request: Mapping[str, Any]) -> list[str]:
    """Return the paths in the library of everything that a job request names there."""
    named = [f"models/{_local(request['model_id'])}"]
    sources = [request.get(purpose) or {} for purpose in ("calibration", "evaluation")]
    texts = [source.get("dataset") for source in sources] + list(sources[1].get("perplexity") or ())
    named += [f"texts/{_local(text)}" for text in texts if text]
    named += [f"tasks/{task}.jsonl" for task in sources[1].get("zero_shot") or ()]
    return [name for name in named if not name.endswith("/")]


def _local(name: str) -> str:
    """Return the name after ``local:``, or nothing for any other name."""
    return name.removeprefix(LOCAL_PREFIX) if name.startswith(LOCAL_PREFIX) else ""


def names(settings: Settings, folder: str) -> list[str]:
    """Return the names of the models, texts or tasks in the library; ``folder`` is one of :data:`FOLDERS`.

    A model is a folder; a text or a task is a file.

    Raises:
        PruningError: ``storage_unavailable``.
    """
    if settings.storage_url is None:
        places = [settings.data_dir / folder]
    elif (root := open_store(settings).root) is not None:
        places = [root / folder]
    else:
        parts = [each.key.split("/") for each in open_store(settings).listing(folder)]
        return sorted({name for _, name, *rest in parts if bool(rest) == (folder == "models")})
    found = [path for place in places if place.is_dir() for path in place.iterdir()]
    return sorted(path.name for path in found if path.is_dir() == (folder == "models"))


def delete_unused(settings: Settings) -> None:
    """Delete the copies of library files that no job and no request has used for a week."""
    for copy in (*settings.data_dir.glob("library/*"), *settings.data_dir.glob("outlines/*")):
        with suppress(FileNotFoundError):
            if time.time() - copy.stat().st_mtime > UNUSED_SECONDS:
                shutil.rmtree(copy, ignore_errors=True)


def _files(store: Store, name: str) -> list[Found]:
    """Return the objects of ``name``: the object of that key, or the objects of that folder, by key."""
    kind, _, _ = name.partition("/")
    return sorted(
        (each for each in store.listing(kind) if each.key == name or each.key.startswith(f"{name}/")),
        key=lambda each: each.key,
    )


def _copy(store: Store, found: list[Found], target: Path, outline: bool) -> None:
    """Copy objects into the folder ``target``, which exists only when it is complete."""
    temporary = target.with_name(f"{target.name}.{os.getpid()}.{time.monotonic_ns()}.tmp")
    for folder in FOLDERS:
        (temporary / folder).mkdir(parents=True)
    try:
        for each in found:
            path = temporary / each.key
            if outline and path.suffix in (".safetensors", ".gguf"):
                _copy_header(store, each, path)
            else:
                store.get_file(each.key, path)
            modified = each.modified.astimezone(dt.UTC).timestamp()
            os.utime(path, (modified, modified))  # the model's fingerprint is the same on every machine
        with suppress(OSError):  # another process has made the same copy
            temporary.rename(target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _copy_header(store: Store, found: Found, path: Path) -> None:
    """Write a file of the object's size that has only the header of the weights."""
    path.parent.mkdir(parents=True, exist_ok=True)
    length = GGUF_HEADER
    if path.suffix == ".safetensors":
        start = b"".join(store.stream(found.key, 0, min(8, found.size)))
        length = 8 + min(struct.unpack("<Q", start.ljust(8, b"\0"))[0], SAFETENSORS_HEADER)
    with path.open("xb") as file:
        for chunk in store.stream(found.key, 0, min(length, found.size)) if found.size else ():
            file.write(chunk)
        file.truncate(found.size)
