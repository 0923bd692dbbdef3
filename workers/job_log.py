"""Collect the lines for the log of a job between two heartbeats: those of its child processes and of its supervisor."""

import datetime as dt
import re
import threading
from collections import deque

from app.jobs.leases import LogLine
from app.jobs.repository import LOG_LINES
from app.sanitise import Sanitiser

MOST_WAITING = LOG_LINES - 1
"""Largest number of lines that wait; one more line says how many were left out."""
LONGEST = 1000
"""Largest number of characters of a line; the rest is left out."""
LONGEST_RAW = 8 * LONGEST
"""Largest number of characters of a line that is cleaned; a secret that is cut off there is beyond ``LONGEST``."""
CONTROL = re.compile(r"\x1b\[[0-9;?]*[ -/]*[@-~]|[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")
"""Escape sequences and control characters, with which a line could change the terminal that shows it."""


class JobLog:
    """Lines of one attempt that are not stored yet; threads may add lines at the same time.

    No more lines wait than a job keeps. Lines are cleaned when they are taken, so that a process that writes much
    delays nobody.
    """

    def __init__(self, sanitiser: Sanitiser) -> None:
        self.sanitiser = sanitiser
        self._waiting: deque[tuple[dt.datetime, str]] = deque(maxlen=MOST_WAITING)
        self._taken: list[LogLine] = []
        self._count = self._lost = 0
        self._lock = threading.Lock()

    def add(self, text: str) -> None:
        """Add a line, or several; of a progress bar, which rewrites its line, the last state remains."""
        with self._lock:
            for line in text.split("\n"):
                shown = line.rstrip().rpartition("\r")[2][:LONGEST_RAW]
                if not shown:
                    continue
                self._lost += len(self._waiting) == MOST_WAITING
                self._waiting.append((dt.datetime.now(dt.UTC), shown))

    def take(self) -> list[LogLine]:
        """Return the lines that are not stored yet; the next call returns them again unless :meth:`stored` is called."""
        with self._lock:
            waiting, lost = list(self._waiting), self._lost
            self._waiting.clear()
            self._lost = 0
        if lost:
            self._taken.append(self._line(waiting[0][0], f"({lost} lines are left out here.)"))
        self._taken += [self._line(written_at, text) for written_at, text in waiting]
        self._taken = self._taken[-LOG_LINES:]
        return list(self._taken)

    def stored(self) -> None:
        """Forget the lines that the last call of :meth:`take` returned."""
        self._taken = []

    def _line(self, written_at: dt.datetime, text: str) -> LogLine:
        self._count += 1
        clean = CONTROL.sub("", self.sanitiser(text))
        return LogLine(self._count, written_at, clean if len(clean) <= LONGEST else f"{clean[:LONGEST]}…")
