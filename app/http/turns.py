"""Work that the API keys do in turn, so that one key's work delays the work of another by little."""

import asyncio
from collections import Counter, deque
from collections.abc import Callable, Hashable
from typing import TypeVar

from anyio import CapacityLimiter, to_thread

T = TypeVar("T")


class Turns:
    """Pieces of work, ``most`` at a time and at most ``each`` of one API key; for one event loop.

    A key whose piece has ended goes behind the keys that wait (round robin). A piece of work therefore waits for the
    earlier pieces of its own key, and for at most ``each`` pieces of each other key between two of them.
    """

    def __init__(self, most: int, each: int = 1) -> None:
        self._limiter = CapacityLimiter(most)
        self._free, self._each = most, each
        self._running: Counter[Hashable] = Counter()
        self._waiting: dict[Hashable, deque[asyncio.Future[None]]] = {}
        """The waiting pieces of each key; the keys are in the order of their next turns."""

    async def run(self, key: Hashable, work: Callable[..., T], *values: object) -> T:
        """Call ``work`` with ``values`` in a thread when it is the API key's turn, and return its result."""
        await self.begin(key)
        try:
            return await to_thread.run_sync(work, *values, limiter=self._limiter)
        finally:
            self.end(key)

    async def begin(self, key: Hashable) -> None:
        """Wait for a turn of the API key; :meth:`end` must follow."""
        if self._free and self._running[key] < self._each and not self._waiting:
            self._begin(key)
            return
        turn = asyncio.get_running_loop().create_future()
        self._waiting.setdefault(key, deque()).append(turn)
        self._begin_next()
        try:
            await turn
        except asyncio.CancelledError:
            if turn.cancelled():  # while it waited
                self._remove(key, turn)
                self._begin_next()
            else:
                self.end(key)
            raise

    def end(self, key: Hashable) -> None:
        """End a turn of the API key, so that the next one begins."""
        self._running[key] -= 1
        if not self._running[key]:
            del self._running[key]
        self._free += 1
        if key in self._waiting:
            self._waiting[key] = self._waiting.pop(key)
        self._begin_next()

    def _begin(self, key: Hashable) -> None:
        self._running[key] += 1
        self._free -= 1

    def _begin_next(self) -> None:
        """Begin the turns that come next, as many as are free."""
        while self._free:
            key = next((key for key in self._waiting if self._running[key] < self._each), None)
            if key is None:
                return
            turn = self._waiting[key][0]
            self._remove(key, turn)
            if key in self._waiting:
                self._waiting[key] = self._waiting.pop(key)
            self._begin(key)
            turn.set_result(None)

    def _remove(self, key: Hashable, turn: asyncio.Future[None]) -> None:
        self._waiting[key].remove(turn)
        if not self._waiting[key]:
            del self._waiting[key]
