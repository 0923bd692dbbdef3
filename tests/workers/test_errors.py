"""What the job's owner is told when a child fails."""

import errno

import pytest
from safetensors import SafetensorError

from secateur.contract.errors import ErrorCode, PruningError
from workers.supervisor_link import explain


@pytest.mark.parametrize(
    ("error", "code", "retryable"),
    [
        (PruningError(ErrorCode.UNSUPPORTED_ARCHITECTURE, "No."), "unsupported_architecture", False),
        (MemoryError(), "out_of_memory", False),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"), "out_of_memory", False),
        (OSError(errno.ENOSPC, "No space left on device"), "disk_full", True),
        (
            SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
            "disk_full",
            True,
        ),
        (KeyError("x"), "internal_error", True),
    ],
)
def test_explain(error: Exception, code: str, retryable: bool, tmp_path: object) -> None:
    told = explain(error, str(tmp_path))
    assert (told["code"], told["retryable"]) == (code, retryable)
    assert str(told["message"])


def test_torch_out_of_memory(tmp_path: object) -> None:
    import torch

    assert explain(torch.OutOfMemoryError("CUDA out of memory."), str(tmp_path))["code"] == "out_of_memory"
