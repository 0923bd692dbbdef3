"""Connect a child process to its supervisor, as the child's side of :mod:`workers.job_process`.

The child takes the job from stdin, writes JSON lines to stdout, and obeys renewals.
"""

import errno
import json
import logging
import math
import os
import resource
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

from app.config import get_settings
from app.http import logs
from secateur.contract.errors import ErrorCode, PruningError
from workers.limits import disk_excess

log = logging.getLogger(__name__)

RECORDED = ("step", "exported")
"""The types of the messages that the supervisor records in the database and acknowledges."""


class SupervisorLink:
    """The supervisor, as its child process sees it."""

    def __init__(self) -> None:
        """Take over stdin and stdout; from then on, everything that libraries print goes to stderr."""
        self._out = os.fdopen(os.dup(1), "w", encoding="utf-8")
        os.dup2(2, 1)
        self._in = os.fdopen(os.dup(0), "rb")
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        self._lock = threading.Lock()
        self._pause = False
        self.keeps_before = False
        """Whether the checkpoint of the step before the recorded one stays."""
        self._recorded = threading.Semaphore(0)
        self.job: dict[str, Any] = json.loads(self._in.readline())
        threading.Thread(target=self._obey, daemon=True).start()

    def tell(self, message: dict[str, Any]) -> None:
        """Send one message; after a message of a type in :data:`RECORDED`, wait until the database has what it says.

        Files that only earlier steps need may be deleted when a step is recorded.
        """
        with self._lock:
            self._out.write(json.dumps(_storable(message)) + "\n")
            self._out.flush()
        if message["type"] in RECORDED:
            self._recorded.acquire()

    def wants_pause(self) -> bool:
        """Return whether the child should stop at the end of the step."""
        return self._pause

    def _obey(self) -> None:
        for line in self._in:
            renewal = json.loads(line)
            self._pause = renewal["pause"]
            if renewal["recorded"]:
                self.keeps_before = renewal["keep"]
                self._recorded.release()
            # The timer ends at a clock time: a renewal that lay in the pipe while the process was stopped is not fresh.
            signal.setitimer(signal.ITIMER_REAL, max(0.001, renewal["deadline"] - time.monotonic()))
        os.kill(os.getpid(), signal.SIGKILL)  # the pipe is closed, so nobody owns this work any more


def run(work: Callable[[SupervisorLink], dict[str, Any]]) -> None:
    """Do ``work``, send the message that it returns or the error that it raises, and end the process."""
    parent = SupervisorLink()
    logs.configure(get_settings())
    with logs.about(**{name: parent.job.get(name) for name in logs.NAMES}):
        try:
            message = work(parent)
        except Exception as error:
            message = {"type": "error", "error": explain(error, parent.job["folder"])}
    parent.tell(message)
    sys.stderr.flush()
    os._exit(0)  # the reading thread would keep the interpreter from closing down cleanly


def explain(error: Exception, folder: str) -> dict[str, Any]:
    """Return what the job's owner is told about ``error``.

    The dictionary has the keys code, message and retryable, and the key field if a person can correct the error.
    """
    if isinstance(error, PruningError):
        return error.as_dict()
    log.error("unexpected", exc_info=error)
    text = str(error)
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError" or "can't allocate memory" in text:
        advice = "use a smaller dtype, fewer or shorter calibration samples, or a larger worker"
        message = f"The model does not fit into the worker's memory: {advice}."
        return PruningError(ErrorCode.OUT_OF_MEMORY, message).as_dict()
    # Errors of safetensors, which is written in Rust, have the errno only in their text.
    if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or "os error 28" in text:
        free = shutil.disk_usage(folder).free
        message = f"The worker's disk is full ({free} bytes are free under the data folder): make room and retry."
        return PruningError(ErrorCode.DISK_FULL, message).as_dict()
    if getattr(error, "errno", None) == errno.EFBIG or "os error 27" in text:
        return disk_excess(resource.getrlimit(resource.RLIMIT_FSIZE)[0]).as_dict()
    message = f"The pruning process failed unexpectedly ({type(error).__name__}); the worker's log has the details."
    return PruningError(ErrorCode.INTERNAL_ERROR, message).as_dict()


def _storable(value: Any) -> Any:
    """Return ``value`` as Postgres's jsonb accepts it.

    Numbers are neither NaN nor infinite; text contains no NUL and no lone surrogate.
    """
    match value:
        case dict():
            return {_storable(key): _storable(item) for key, item in value.items()}
        case list() | tuple():
            return [_storable(item) for item in value]
        case float():
            return value if math.isfinite(value) else None
        case str():
            return value.replace("\x00", "").encode(errors="replace").decode()
    return value
