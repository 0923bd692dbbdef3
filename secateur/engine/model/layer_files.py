"""Layers in files: memory holds the layer that is worked on, and the kernel reads the others when they are run."""

import ctypes
import errno
import logging
import tempfile
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

log = logging.getLogger(__name__)

TRIM = getattr(ctypes.CDLL(None), "malloc_trim", None)
"""The function of glibc that gives freed memory back to the system; other C libraries have no such function."""
FULL = (errno.ENOSPC, errno.EDQUOT)


class LayerFiles:
    """Files in ``folder`` that hold layers which a run has cut.

    A loaded model's tensors on a CPU are mapped from the files of the source, and so are not held in memory. The tensors
    of a cut layer are new; this class maps them from a file, too. A file has no name once it is mapped, and the system
    deletes it with the last of its tensors. Where the disk is full, layers stay in memory.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def hold(self, module: nn.Module) -> None:
        """Write the parameters of ``module`` to a file and map them from the file, in place."""
        parameters = dict(module.named_parameters(remove_duplicate=False))
        names = {id(parameter): name for name, parameter in parameters.items()}
        try:
            mapped = self._mapped({names[id(each)]: each.detach().contiguous() for each in parameters.values()})
        except (OSError, SafetensorError) as error:
            if not _is_full(error):
                raise
            log.warning("a cut layer stays in memory, because %s is full: %s", self._folder, error)
            return
        held = {
            name: nn.Parameter(tensor, requires_grad=parameters[name].requires_grad) for name, tensor in mapped.items()
        }
        for name, parameter in parameters.items():
            owner, _, kind = name.rpartition(".")
            module.get_submodule(owner).register_parameter(kind, held[names[id(parameter)]])
        self.tidy()

    def tidy(self) -> None:
        """Give freed memory back to the system: the process would otherwise keep the freed tensors of many layers."""
        if TRIM is not None:
            TRIM(0)

    def _mapped(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return the same tensors, mapped from a file."""
        # Some network file systems keep the name of a file that is mapped, and so its folder.
        with tempfile.TemporaryDirectory(prefix="layer.", dir=self._folder, ignore_cleanup_errors=True) as folder:
            file = Path(folder, "layer.safetensors")
            save_file(tensors, file)
            mapped: dict[str, Tensor] = load_file(file)
        return mapped


def _is_full(error: Exception) -> bool:
    """Return whether the disk or its quota is full; errors of safetensors tell the number in their text."""
    return getattr(error, "errno", None) in FULL or any(f"os error {number})" in str(error) for number in FULL)
