"""Limits on the memory and the disk that a job's child process and all its own children use, kept by killing them.

The kernel's own limits do not fit: RLIMIT_DATA and RLIMIT_AS also count the files of weights that are mapped into
memory and that the kernel can drop at any time, and a control group takes rights that a worker does not have.
"""

import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import psutil

from app.config import Settings
from secateur.contract.errors import ErrorCode, PruningError
from workers.devices import host_memory

MEMORY_INTERVAL = 0.25
DISK_INTERVAL = 2.0
BLOCK = 512
"""Unit of ``st_blocks`` in bytes (stat(2))."""


@dataclass(frozen=True)
class Limits:
    """The bytes of memory that the processes may use, and the bytes that they may write into ``folder``."""

    memory: int
    disk: int | None
    folder: Path

    @classmethod
    def of(cls, settings: Settings, folder: Path) -> "Limits":
        """Return the limits of a job whose files are in ``folder``."""
        return cls(settings.max_child_memory_bytes or host_memory(), settings.max_job_disk_bytes, folder)

    def watch(self, pid: int, ended: Callable[[], bool]) -> PruningError | None:
        """Watch the process ``pid`` until it has ``ended``, and return ``None``, or the limit that it exceeds before."""
        next_disk = 0.0
        while not ended():
            if (used := used_memory(pid)) > self.memory:
                return PruningError(
                    ErrorCode.OUT_OF_MEMORY,
                    f"The job's processes took {used:,} bytes of memory; allowed are {self.memory:,}. Use a smaller "
                    "dtype, fewer or shorter calibration samples, or a larger worker.",
                )
            if self.disk is not None and time.monotonic() >= next_disk:
                next_disk = time.monotonic() + DISK_INTERVAL
                if (used := used_disk(self.folder)) > self.disk:
                    return disk_excess(self.disk)
            time.sleep(MEMORY_INTERVAL)
        return None


def disk_excess(allowed: int) -> PruningError:
    """Return the error of a job that wrote more than the ``allowed`` bytes."""
    return PruningError(
        ErrorCode.DISK_LIMIT_EXCEEDED,
        f"The job's files take more space than the {allowed:,} bytes that are allowed. Use a smaller model, or a larger "
        "target ratio.",
    )


def used_memory(pid: int) -> int:
    """Return the bytes of memory that belong to a process and its descendants alone; mapped files do not count."""
    total = 0
    with suppress(psutil.NoSuchProcess):
        process = psutil.Process(pid)
        for each in (process, *process.children(recursive=True)):
            with suppress(psutil.Error):
                memory = each.memory_info()
                total += memory.rss - memory.shared
    return total


def used_disk(folder: Path) -> int:
    """Return the bytes on disk of all files in a folder; a file with several names counts once."""
    sizes: dict[int, int] = {}
    for file in folder.rglob("*"):
        with suppress(FileNotFoundError):
            status = file.lstat()
            sizes[status.st_ino] = status.st_blocks * BLOCK
    return sum(sizes.values())
