"""Tensors that a state refers to: written whole or not at all, read only if they are what was written."""

import hashlib
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors.torch import load, save
from torch import Tensor

from secateur.contract.errors import ErrorCode, PruningError
from secateur.engine.run.state import TensorReference
from secateur.files import write_whole


@contextmanager
def folder(given: Path | None, beside: Path | None) -> Iterator[Path]:
    """The folder ``given``, or a temporary one in ``beside`` (else in the system's) that is deleted when the context ends."""
    if given is not None:
        given.mkdir(parents=True, exist_ok=True)
        yield given
        return
    with tempfile.TemporaryDirectory(prefix=".scratch.", dir=beside) as temporary:
        yield Path(temporary)


def write(folder: Path, name: str, tensors: dict[str, Tensor]) -> TensorReference:
    """Write ``step-NAME-HASH.safetensors``; returns the reference that :func:`read` takes."""
    content = save({key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()})
    digest = hashlib.sha256(content).hexdigest()
    path = folder / f"step-{name}-{digest[:12]}.safetensors"
    write_whole(path, content)
    return TensorReference(file=path.name, sha256=digest)


def delete_all_but(folder: Path, references: Iterable[TensorReference]) -> None:
    """Delete the files that :func:`write` has put into ``folder``, except those of ``references``."""
    kept = {reference.file for reference in references}
    for path in folder.glob("step-*.safetensors"):
        if path.name not in kept:
            path.unlink()


def read(folder: Path, reference: TensorReference) -> dict[str, Tensor]:
    """The tensors, on the CPU.

    Raises:
        PruningError: ``checkpoint_damaged`` when the file is missing or not what was written.
    """
    try:
        content = (folder / reference.file).read_bytes()
    except FileNotFoundError:
        content = b""
    if hashlib.sha256(content).hexdigest() != reference.sha256:
        raise PruningError(
            ErrorCode.CHECKPOINT_DAMAGED,
            f"The checkpoint file {reference.file} is missing or damaged; start the job anew.",
        )
    tensors: dict[str, Tensor] = load(content)
    return tensors
