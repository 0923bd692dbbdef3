"""Layers in files: memory holds the layer that is worked on, and the kernel reads the others when they are run."""

import ctypes
import tempfile
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from secateur.contract.errors import ErrorCode, PruningError

TRIM = getattr(ctypes.CDLL(None), "malloc_trim", None)
"""The function of glibc that gives freed memory back to the system; other C libraries have no such function."""


class LayerFiles:
    """Files in ``folder`` that hold layers which a run has cut.

    A loaded model's tensors on a CPU are mapped from the files of the source, and so are not held in memory. The tensors
    of a cut layer are new; this class maps them from a file, too. A file has no name once it is mapped, and the system
    deletes it with the last of its tensors, even if the process is killed.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def hold(self, module: nn.Module) -> None:
        """Write the parameters of ``module`` to a file and map them from the file, in place.

        Raises:
            PruningError: ``disk_full`` (retryable).
        """
        parameters = dict(module.named_parameters())
        with tempfile.TemporaryDirectory(prefix="layer.", dir=self._folder) as folder:
            file = Path(folder, "layer.safetensors")
            try:
                save_file({name: parameter.detach().contiguous() for name, parameter in parameters.items()}, file)
            except (OSError, SafetensorError) as error:
                message = f"A cut layer cannot be written to {self._folder}: {error}."
                raise PruningError(ErrorCode.DISK_FULL, message) from error
            mapped = load_file(file)
        for name, parameter in parameters.items():
            owner, _, kind = name.rpartition(".")
            held = nn.Parameter(mapped[name], requires_grad=parameter.requires_grad)
            module.get_submodule(owner).register_parameter(kind, held)
        if TRIM is not None:  # the freed tensors of many layers would otherwise stay in the process
            TRIM(0)
