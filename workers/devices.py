"""Ask the driver and the kernel what this machine computes on, without loading torch."""

import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

CGROUP_LIMITS = (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"))
"""Files with the memory limit of the control group, in version 2 and version 1."""


def gpus() -> list[str]:
    """Return the GPUs to use, by the names that ``CUDA_VISIBLE_DEVICES`` gives them."""
    if "CUDA_VISIBLE_DEVICES" in os.environ:
        return [name for name in os.environ["CUDA_VISIBLE_DEVICES"].split(",") if name.strip()]
    return [str(number) for number, line in enumerate(_nvidia_smi("-L")) if line.startswith("GPU ")]


def device_memory(most: int | None = None) -> dict[str, Any]:
    """Return ``device`` (``cuda`` or ``cpu``) and, where it is known, ``memory_bytes``.

    The memory is that of the first GPU to use, or that of the machine, of which a job may use ``most`` bytes.
    """
    if visible := gpus():
        found = _nvidia_smi("--query-gpu=memory.total", "--format=csv,noheader,nounits", f"--id={visible[0]}")
        if found and found[0].strip().isdigit():
            return {"device": "cuda", "memory_bytes": int(found[0]) * 2**20}
        return {"device": "cuda"}
    machine = host_memory()
    return {"device": "cpu", "memory_bytes": min(machine, most or machine)}


def host_memory() -> int:
    """Return the bytes of memory that the machine or the container has."""
    machine = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    limits = [path.read_text().strip() for path in CGROUP_LIMITS if path.is_file()]
    return min([machine, *(int(limit) for limit in limits if limit.isdigit())])


def _nvidia_smi(*arguments: str) -> list[str]:
    """Return the lines that ``nvidia-smi`` prints, or no lines where there is no driver."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return []
    return subprocess.run([program, *arguments], capture_output=True, text=True, timeout=30).stdout.splitlines()
