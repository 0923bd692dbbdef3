"""Child processes that never outlive their parent process."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

LAUNCH = str(Path(__file__).with_name("launch.py"))


def spawn(
    argv: list[str],
    *,
    death_signal: int = signal.SIGKILL,
    timer: float | None = None,
    user: tuple[int, int, int | None] | None = None,
    file_size: int | None = None,
    **popen: Any,
) -> subprocess.Popen[bytes]:
    """Start ``argv``, whose first item is an absolute path, in a session of its own.

    The kernel sends ``death_signal`` to the child when the calling thread ends, for whatever reason; long-lived
    children must therefore be started from the main thread. The kernel kills the child after ``timer`` seconds unless
    the child sets ITIMER_REAL again. ``user`` is (uid, gid, capability to keep), as in :func:`secateur.launch.become`.
    Neither the child nor its own children can write a file of more than ``file_size`` bytes (RLIMIT_FSIZE).
    ``popen`` holds further arguments of :class:`subprocess.Popen`.
    """
    options = {
        "parent": os.getpid(),
        "death_signal": int(death_signal),
        "timer": timer,
        "user": user,
        "file_size": file_size,
    }
    return subprocess.Popen(
        [sys.executable, "-I", "-S", LAUNCH, json.dumps(options), *argv], start_new_session=True, **popen
    )


def run(argv: list[str], **popen: Any) -> subprocess.CompletedProcess[str]:
    """Run ``argv`` to its end with :func:`spawn`, and return the exit code and the output."""
    with spawn(argv, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, **popen) as process:
        out, err = (output.decode(errors="replace") for output in process.communicate())
    return subprocess.CompletedProcess(argv, process.returncode, out, err)


def describe_exit(code: int) -> str:
    """Return a return code of :class:`subprocess.Popen` in words."""
    return f"was killed by {signal.Signals(-code).name}" if code < 0 else f"exited with code {code}"
