"""Requests of API keys in turn: a key that sends many at once does not keep the requests of another waiting."""

import asyncio
from collections.abc import Callable
from contextvars import ContextVar

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from app.http.turns import Turns

MOST = 1000
"""Largest number of requests that hold a turn; far more than keys, because the limit is meant for one key."""
EACH = 2
"""Largest number of requests of one API key that hold a turn."""
LONGEST = 0.1
"""Number of seconds after which a request gives its turn back: what takes so long waits for something else."""

_give_back: ContextVar[Callable[[], None] | None] = ContextVar("give_back", default=None)


class Fair:
    """ASGI middleware that begins few requests of one API key at a time; the others wait for their turn.

    A request holds its turn until its answer begins, or until it calls :func:`waits`, and for :data:`LONGEST` at most.
    Keys are told apart by the header ``Authorization``, before anything of the request is looked at; requests without
    it do not wait.
    """

    def __init__(self, app: ASGIApp) -> None:
        self.app = app
        self._turns = Turns(MOST, EACH)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        given = Headers(scope=scope).get("authorization", "") if scope["type"] == "http" else ""
        key = given.partition(" ")[2].strip()  # the scheme may be spelt in many ways
        if not key:
            return await self.app(scope, receive, send)
        await self._turns.begin(key)
        held = True

        def give_back() -> None:
            nonlocal held
            if held:
                held = False
                timer.cancel()
                self._turns.end(key)

        async def answered(message: Message) -> None:
            await send(message)
            give_back()

        timer = asyncio.get_running_loop().call_later(LONGEST, give_back)
        earlier = _give_back.set(give_back)
        try:
            await self.app(scope, receive, answered)
        finally:
            _give_back.reset(earlier)
            give_back()


def waits() -> None:
    """Give the turn of the present request back, because the request will wait."""
    if (give_back := _give_back.get()) is not None:
        give_back()
