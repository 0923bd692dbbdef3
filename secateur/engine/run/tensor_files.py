"""Files of the tensors to which a state refers.

A file is written completely or not at all, and its hash is checked when it is read.
"""

import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors.torch import load_file, save_file
from torch import Tensor

from secateur.contract.errors import ErrorCode, PruningError
from secateur.engine.run.state import TensorReference
from secateur.files import sha256, sync, written_whole


@contextmanager
def folder(given: Path | None, beside: Path | None) -> Iterator[Path]:
    """Yield the folder ``given``, or else a temporary folder that is deleted when the context ends.

    The temporary folder is in ``beside``, or else in the system's folder for temporary files.
    """
    if given is not None:
        given.mkdir(parents=True, exist_ok=True)
        yield given
        return
    with tempfile.TemporaryDirectory(prefix=".scratch.", dir=beside) as temporary:
        yield Path(temporary)


def write(folder: Path, name: str, tensors: dict[str, Tensor]) -> TensorReference:
    """Write ``step-NAME-HASH.safetensors`` and return the reference that :func:`read` takes."""
    written = folder / f"step-{name}.safetensors"
    with written_whole(written) as file:
        save_file({key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}, file)
        digest = sha256(file)
    path = written.with_stem(f"{written.stem}-{digest[:12]}")
    written.replace(path)
    sync(folder)
    return TensorReference(file=path.name, sha256=digest)


def delete_all_but(folder: Path, references: Iterable[TensorReference]) -> None:
    """Delete the files that :func:`write` wrote into ``folder``, except the files of ``references``."""
    kept = {reference.file for reference in references}
    for path in folder.glob("step-*.safetensors"):
        if path.name not in kept:
            path.unlink()


def read(folder: Path, reference: TensorReference) -> dict[str, Tensor]:
    """Read the tensors of a reference; they are on the CPU, and mapped from the file.

    Raises:
        PruningError: ``checkpoint_damaged`` when the file is missing or differs from the written file.
    """
    path = folder / reference.file
    if not path.is_file() or sha256(path) != reference.sha256:
        raise PruningError(
            ErrorCode.CHECKPOINT_DAMAGED,
            f"The checkpoint file {reference.file} is missing or damaged; start the job anew.",
        )
    tensors: dict[str, Tensor] = load_file(path)
    return tensors
