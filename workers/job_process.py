"""Child processes that never outlive their parent, and the JSON lines spoken with those that work on a job."""

import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

from secateur.processes import spawn

STDERR_LINES = 40
END = object()


class JobProcess:
    """A process that works on a job: renewals go to its stdin, messages come from its stdout, one JSON object a line.

    Its life hangs on three things, each enough to end it: this process (PDEATHSIG), the deadline of the last renewal
    (ITIMER_REAL, a timer of the kernel), and :meth:`kill`.
    """

    def __init__(self, argv: list[str], job: dict[str, Any], deadline: float, temporary: Path) -> None:
        """Start ``argv`` and hand it ``job``; at ``deadline`` (``time.monotonic()``) it dies unless renewed.

        What it and its libraries put into temporary files is in the folder ``temporary``.
        """
        self.deadline = deadline
        """The last one that it was given while it lived."""
        self._process = spawn(
            argv,
            timer=max(0.001, deadline - time.monotonic()),
            env=os.environ | {"TMPDIR": str(temporary)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        self._messages: queue.Queue[Any] = queue.Queue()
        self._stderr: deque[str] = deque(maxlen=STDERR_LINES)
        self._readers = [
            threading.Thread(target=self._read_messages, args=(self._process.stdout,), daemon=True),
            threading.Thread(target=self._read_stderr, args=(self._process.stderr,), daemon=True),
        ]
        for reader in self._readers:
            reader.start()
        self._send(job)

    def renew(self, deadline: float, pause: bool, recorded: bool = False) -> None:
        """Let it live until ``deadline`` (``time.monotonic()``) and tell it whether to stop at the step's end.

        ``recorded``: the step that it reported last is recorded, and it may go on.
        """
        if self._process.poll() is None:
            self.deadline = deadline
        self._send({"deadline": deadline, "pause": pause, "recorded": recorded})

    def receive(self, timeout: float) -> dict[str, Any] | None:
        """The next message, or ``None`` after ``timeout`` seconds.

        Raises:
            EOFError: it has ended and said all it had to say.
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
        """Kill it and all it started; returns its return code. Does nothing more when it is dead already."""
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
            pass  # dead: receive() says so

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
            for line in pipe:
                text = line.decode(errors="replace").replace("\x00", "")
                self._stderr.append(text.rstrip()[:2000])
                print(text, end="", file=sys.stderr, flush=True)
