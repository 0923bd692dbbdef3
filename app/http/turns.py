"""Threads that the API keys use in turn, so that one key's work delays the work of another by little."""

import asyncio
import uuid
from collections import deque
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import TypeVar

from anyio import CapacityLimiter, to_thread

T = TypeVar("T")


class Turns:
    """Work of API keys in ``threads`` threads, at most one piece of each key at a time; for one event loop.

    A key whose piece has ended goes behind the keys that wait (round robin). A piece of work therefore waits for the
    earlier pieces of its own key, and for at most one piece of each other key between two of them.
    """

    def __init__(self, threads: int) -> None:
        self._limiter = CapacityLimiter(threads)
        self._free = threads
        self._running: set[uuid.UUID] = set()
        self._waiting: dict[uuid.UUID, deque[asyncio.Future[None]]] = {}
        """The waiting pieces of each key; the keys are in the order of their next turns."""

    async def run(self, key_id: uuid.UUID, work: Callable[..., T], *values: object) -> T:
        """Call ``work`` with ``values`` in a thread when it is the API key's turn, and return its result."""
        async with self._turn(key_id):
            return await to_thread.run_sync(work, *values, limiter=self._limiter)

    @asynccontextmanager
    async def _turn(self, key_id: uuid.UUID) -> AsyncIterator[None]:
        turn = asyncio.get_running_loop().create_future()
        self._waiting.setdefault(key_id, deque()).append(turn)
        self._begin_next()
        try:
            await turn
            yield
        finally:
            if turn.cancelled():  # while it waited
                self._remove(key_id, turn)
            else:
                self._running.remove(key_id)
                self._free += 1
                if key_id in self._waiting:
                    self._waiting[key_id] = self._waiting.pop(key_id)
            self._begin_next()

    def _begin_next(self) -> None:
        """Begin the turns of the keys that come next, as many as there are free threads."""
        for key_id in [key_id for key_id in self._waiting if key_id not in self._running][: self._free]:
            turn = self._waiting[key_id][0]
            self._remove(key_id, turn)
            self._running.add(key_id)
            self._free -= 1
            turn.set_result(None)

    def _remove(self, key_id: uuid.UUID, turn: asyncio.Future[None]) -> None:
        self._waiting[key_id].remove(turn)
        if not self._waiting[key_id]:
            del self._waiting[key_id]
