"""Tensors that a state refers to: written whole or not at all, read only if they are what was written."""

import hashlib
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors.torch import load, save
from torch import Tensor

from secateur.contract.errors import PruningError
from secateur.files import write_whole


@contextmanager
def folder(given: Path | None, beside: Path) -> Iterator[Path]:
    """The folder ``given``, or one in ``beside`` that goes when the context ends."""
    if given is not None:
        yield given
        return
    beside.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".scratch.", dir=beside) as temporary:
        yield Path(temporary)


def write(folder: Path, name: str, tensors: dict[str, Tensor]) -> dict[str, Any]:
    """Write ``round-NAME.safetensors``; the JSON-able reference that :func:`read` takes."""
    content = save({key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()})
    digest = hashlib.sha256(content).hexdigest()
    path = folder / f"round-{name}-{digest[:12]}.safetensors"
    write_whole(path, content)
    return {"file": path.name, "sha256": digest}


def delete_all_but(folder: Path, references: Iterable[dict[str, Any]]) -> None:
    """Delete all that :func:`write` has put into ``folder`` but what ``references`` are of."""
    kept = {reference["file"] for reference in references}
    for path in folder.glob("round-*.safetensors"):
        if path.name not in kept:
            path.unlink()


def read(folder: Path, reference: dict[str, Any]) -> dict[str, Tensor]:
    """The tensors, on the CPU.

    Raises:
        PruningError: ``checkpoint_damaged`` when the file is missing or not what was written.
    """
    try:
        content = (folder / reference["file"]).read_bytes()
    except FileNotFoundError:
        content = b""
    if hashlib.sha256(content).hexdigest() != reference["sha256"]:
        raise PruningError(
            "checkpoint_damaged", f"The checkpoint file {reference['file']} is missing or damaged; start the job anew."
        )
    tensors: dict[str, Tensor] = load(content)
    return tensors
