"""What this machine computes on, asked of the driver and the kernel: torch is not to be loaded for it."""

import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

CGROUP_LIMITS = (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"))
"""Of version 2 and 1."""


def gpus() -> list[str]:
    """The GPUs to use, as ``CUDA_VISIBLE_DEVICES`` names them."""
    if "CUDA_VISIBLE_DEVICES" in os.environ:
        return [name for name in os.environ["CUDA_VISIBLE_DEVICES"].split(",") if name.strip()]
    return [str(number) for number, line in enumerate(_nvidia_smi("-L")) if line.startswith("GPU ")]


def device_memory() -> dict[str, Any]:
    """``device``, ``cuda`` or ``cpu``, and ``memory_bytes``: of the first GPU to use, or what the machine or container has."""
    if visible := gpus():
        found = _nvidia_smi("--query-gpu=memory.total", "--format=csv,noheader,nounits", f"--id={visible[0]}")
        if found and found[0].strip().isdigit():
            return {"device": "cuda", "memory_bytes": int(found[0]) * 2**20}
        return {"device": "cuda"}
    machine = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    limits = [path.read_text().strip() for path in CGROUP_LIMITS if path.is_file()]
    return {"device": "cpu", "memory_bytes": min([machine, *(int(limit) for limit in limits if limit.isdigit())])}


def _nvidia_smi(*arguments: str) -> list[str]:
    """Its lines; none where there is no driver."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return []
    return subprocess.run([program, *arguments], capture_output=True, text=True, timeout=30).stdout.splitlines()
