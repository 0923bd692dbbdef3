"""Waiting for a job to change: one Postgres listener per process wakes all waiters, and no waiter holds a thread."""

import asyncio
import logging
import uuid
from collections import defaultdict
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from typing import TypeVar

import psycopg
from sqlalchemy import make_url

from app.http.places import Places
from app.http.turns import Turns

T = TypeVar("T")

log = logging.getLogger(__name__)

CHANNEL = "secateur_jobs"
POLL = 5.0
"""Number of seconds after which a waiter reads the job itself, because a notification may be lost while the listener
reconnects."""
RECONNECT = 1.0
READERS, READERS_EACH = 8, 2
"""Largest number of waiters that read their jobs at once, of all API keys and of one: one change may wake hundreds."""


class Signal:
    """A wake-up signal for one waiter, set when a job may have changed."""

    def __init__(self) -> None:
        self._event = asyncio.Event()

    def set(self) -> None:
        self._event.set()

    async def wait(self, seconds: float) -> None:
        """Wait until the signal is set, ``seconds`` have passed or ``POLL`` seconds have passed."""
        with suppress(TimeoutError):
            await asyncio.wait_for(self._event.wait(), min(seconds, POLL))
        self._event.clear()


class Feed:
    """The distributor of notifications to the waiters of this process; it runs entirely on one event loop.

    One API key has at most ``most`` waiters.
    """

    def __init__(self, most: int) -> None:
        self._signals: defaultdict[uuid.UUID, set[Signal]] = defaultdict(set)
        self._places = Places(most)
        self._turns = Turns(READERS, READERS_EACH)

    async def read(self, key_id: uuid.UUID, look: Callable[[], T]) -> T:
        """Call ``look`` in a thread when it is the API key's turn among the waiters, and return its result."""
        return await self._turns.run(key_id, look)

    def is_full(self, key_id: uuid.UUID) -> bool:
        """Return whether the API key has as many waiters as it may have."""
        return self._places.are_taken(key_id)

    @contextmanager
    def signal(self, key_id: uuid.UUID, job_id: uuid.UUID) -> Iterator[Signal]:
        """Yield a signal for ``job_id``; take the signal before reading the job, so that no change is missed.

        Raises:
            Problem: 429 with ``Retry-After`` if the API key has as many waiters as it may have.
        """
        signal = Signal()
        with self._places.taken(key_id, "waiting requests"):
            self._signals[job_id].add(signal)
            try:
                yield signal
            finally:
                self._signals[job_id].discard(signal)
                if not self._signals[job_id]:
                    del self._signals[job_id]

    @asynccontextmanager
    async def listening(self, database_url: str) -> AsyncIterator[None]:
        """Listen to the database's notifications while the context is open."""
        task = asyncio.create_task(self._listen(database_url))
        try:
            yield
        finally:
            task.cancel()
            with suppress(asyncio.CancelledError):
                await task

    async def _listen(self, database_url: str) -> None:
        url = make_url(database_url).set(drivername="postgresql").render_as_string(hide_password=False)
        while True:
            try:
                async with await psycopg.AsyncConnection.connect(
                    url,
                    autocommit=True,
                    connect_timeout=3,
                    keepalives_idle=5,
                    keepalives_interval=2,
                    keepalives_count=2,
                ) as connection:
                    await connection.execute(f"LISTEN {CHANNEL}")
                    self._set_all()
                    async for notification in connection.notifies():
                        self._set(notification.payload)
            except (psycopg.Error, OSError) as error:
                log.warning("listener lost the database: %s", error)
            await asyncio.sleep(RECONNECT)

    def _set(self, payload: str) -> None:
        with suppress(ValueError):
            for signal in self._signals.get(uuid.UUID(payload), ()):
                signal.set()

    def _set_all(self) -> None:
        """Wake every waiter, because changes during an interruption of the listener are unknown."""
        for signals in self._signals.values():
            for signal in signals:
                signal.set()
