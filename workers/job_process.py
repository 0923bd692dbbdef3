"""Start child processes that never outlive their parent.

Parent and child exchange JSON lines if the child works on a job.
"""

import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

from secateur.contract.errors import PruningError
from secateur.processes import spawn
from workers.limits import Limits

STDERR_LINES = 40
LONGEST_LINE = 2**16
"""Number of bytes after which a line counts as ended, so that a line without an end does not fill the memory."""
END = object()


class JobProcess:
    """A process that works on a job.

    Renewals go to the stdin of the process, and messages come from its stdout, one JSON object a line. The process ends
    with this process (PDEATHSIG), at the deadline of the last renewal (ITIMER_REAL, a timer of the kernel), or by
    :meth:`kill`; each of the three is enough.
    """

    def __init__(
        self,
        argv: list[str],
        job: dict[str, Any],
        deadline: float,
        temporary: Path,
        heard: Callable[[str], object],
        limits: Limits,
    ) -> None:
        """Start ``argv`` and send it ``job``.

        The process dies at ``deadline`` (``time.monotonic()``) unless it is renewed, and when it exceeds ``limits``. The
        temporary files of the process and its libraries are in the folder ``temporary``. ``heard`` is called with each
        line that the process writes to stderr, from a thread.
        """
        self.excess: PruningError | None = None
        """The limit for which the process was killed."""
        self.deadline = deadline
        """The last deadline that the process was given while it lived."""
        self._process = spawn(
            argv,
            timer=max(0.001, deadline - time.monotonic()),
            file_size=limits.disk,
            # A process without a Hub token must not find the service's token in the environment or on the disk.
            env=os.environ | {"TMPDIR": str(temporary), "HF_HUB_DISABLE_IMPLICIT_TOKEN": "1"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        self._heard = heard
        self._messages: queue.Queue[Any] = queue.Queue()
        self._stderr: deque[str] = deque(maxlen=STDERR_LINES)
        self._readers = [
            threading.Thread(target=self._read_messages, args=(self._process.stdout,), daemon=True),
            threading.Thread(target=self._read_stderr, args=(self._process.stderr,), daemon=True),
            threading.Thread(target=self._keep_within, args=(limits,), daemon=True),
        ]
        for reader in self._readers:
            reader.start()
        self._send(job)

    def renew(self, deadline: float, pause: bool, recorded: bool = False, keep: bool = False) -> None:
        """Let the process live until ``deadline``, and tell it whether to stop at the end of the step.

        ``deadline`` is a time of ``time.monotonic()``. ``recorded`` says that the step or export that the process
        reported last is recorded, and that the process may go on; ``keep``, that the checkpoint of the step before stays.
        """
        if self._process.poll() is None:
            self.deadline = deadline
        self._send({"deadline": deadline, "pause": pause, "recorded": recorded, "keep": keep})

    def receive(self, timeout: float) -> dict[str, Any] | None:
        """Return the next message, or ``None`` after ``timeout`` seconds.

        Raises:
            EOFError: the process has ended, and all its messages have been received.
        """
        try:
            message = self._messages.get(timeout=timeout)
        except queue.Empty:
            return None
        if message is END:
            self._messages.put(END)
            raise EOFError
        return message

    def kill(self) -> int:
        """Kill the process and all that it started, and return its return code.

        If the process is already dead, its return code is returned and nothing else happens.
        """
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        code = self._process.wait()
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):
            self._process.stdin.close()
        for reader in self._readers:
            reader.join(timeout=1)
        return code

    @property
    def stderr_tail(self) -> str:
        return "\n".join(self._stderr)

    def _send(self, message: dict[str, Any]) -> None:
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(message).encode() + b"\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            pass  # the process is dead, and receive() reports that

    def _keep_within(self, limits: Limits) -> None:
        self.excess = limits.watch(self._process.pid, self._has_ended)
        if self.excess is not None:
            with suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)

    def _has_ended(self) -> bool:
        """Return whether the process has ended, and leave its return code and its id to :meth:`kill`."""
        try:
            return os.waitid(os.P_PID, self._process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None
        except ChildProcessError:
            return True

    def _read_messages(self, pipe: IO[bytes]) -> None:
        with pipe:
            try:
                for line in pipe:
                    self._messages.put(json.loads(line))
            except ValueError as error:
                self._stderr.append(f"unreadable message: {error}")
            finally:
                self._messages.put(END)

    def _read_stderr(self, pipe: IO[bytes]) -> None:
        with pipe:
            while line := pipe.readline(LONGEST_LINE):
                text = line.decode(errors="replace").replace("\x00", "")
                self._stderr.append(text.rstrip()[:2000])
                self._heard(text)
                print(text, end="", file=sys.stderr, flush=True)
