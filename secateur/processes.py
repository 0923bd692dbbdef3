"""Child processes that never outlive their parent."""

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
    **popen: Any,
) -> subprocess.Popen[bytes]:
    """Start ``argv`` (its first item an absolute path) in a session of its own.

    The kernel sends it ``death_signal`` when this thread ends, however it ends, so start lasting children from the main
    thread; and kills it after ``timer`` seconds unless it sets ITIMER_REAL anew. ``user`` is (uid, gid, capability to
    keep), see :func:`secateur.launch.become`. ``popen`` goes to :class:`subprocess.Popen`.
    """
    options = {"parent": os.getpid(), "death_signal": int(death_signal), "timer": timer, "user": user}
    return subprocess.Popen(
        [sys.executable, "-I", "-S", LAUNCH, json.dumps(options), *argv], start_new_session=True, **popen
    )


def run(argv: list[str], **popen: Any) -> subprocess.CompletedProcess[str]:
    """Run ``argv`` to its end as :func:`spawn` starts it; what it printed is in the result."""
    with spawn(argv, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, **popen) as process:
        out, err = (output.decode(errors="replace") for output in process.communicate())
    return subprocess.CompletedProcess(argv, process.returncode, out, err)


def describe_exit(code: int) -> str:
    """A return code of :class:`subprocess.Popen` in words."""
    return f"was killed by {signal.Signals(-code).name}" if code < 0 else f"exited with code {code}"
