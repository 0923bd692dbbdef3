"""Requests of one API key wait for one another, and not those of another key."""

import asyncio
from collections.abc import Awaitable, Callable

import pytest
from starlette.types import Message, Receive, Scope, Send

from app.http import fair
from app.http.fair import Fair
from tests.patience import PATIENCE


class App:
    """An application whose answers come when they are let go; ``began`` lists the requests that it was given."""

    def __init__(self) -> None:
        self.began: list[str] = []
        self.let_go: dict[str, asyncio.Event] = {}
        self.during: dict[str, Callable[[], object]] = {}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        name = scope["path"]
        self.began.append(name)
        self.during.get(name, lambda: None)()
        await self.let_go[name].wait()
        await send({"type": "http.response.start", "status": 200, "headers": []})


async def no_body() -> Message:
    return {"type": "http.request", "body": b"", "more_body": False}


async def ignore(message: Message) -> None:
    pass


def ask(app: App, through: Fair, name: str, key: str | None) -> "asyncio.Task[None]":
    app.let_go[name] = asyncio.Event()
    headers = [] if key is None else [(b"authorization", f"Bearer {key}".encode())]
    scope = {"type": "http", "path": name, "headers": headers}
    return asyncio.create_task(through(scope, no_body, ignore))


async def settle() -> None:
    for _ in range(20):
        await asyncio.sleep(0)


def run(scenario: Callable[[App, Fair], Awaitable[None]]) -> None:
    async def limited() -> None:
        app = App()
        async with asyncio.timeout(PATIENCE):
            await scenario(app, Fair(app))

    asyncio.run(limited())


@pytest.fixture(autouse=True)
def held_for_long(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fair, "LONGEST", PATIENCE)


def test_a_flood_of_one_key_keeps_no_other_key_waiting() -> None:
    async def scenario(app: App, through: Fair) -> None:
        tasks = [ask(app, through, f"a{number}", "a") for number in range(5)]
        tasks += [ask(app, through, "b", "b"), ask(app, through, "nobody", None)]
        await settle()
        assert app.began == ["a0", "a1", "b", "nobody"]
        app.let_go["a0"].set()
        await settle()
        assert app.began[4:] == ["a2"]
        for event in app.let_go.values():
            event.set()
        await asyncio.gather(*tasks)

    run(scenario)


@pytest.mark.parametrize("how", ["it says so", "it takes long", "it fails", "its client leaves"])
def test_what_waits_gives_its_turn_back(how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> None:
        raise RuntimeError

    async def scenario(app: App, through: Fair) -> None:
        if how == "it takes long":
            monkeypatch.setattr(fair, "LONGEST", 0.01)
        if how == "it says so":
            app.during = {"a0": fair.waits}
        if how == "it fails":
            app.during = {"a0": fail}
        tasks = [ask(app, through, f"a{number}", "a") for number in range(3)]
        await settle()
        if how == "its client leaves":
            tasks[0].cancel()
        while app.began != ["a0", "a1", "a2"]:
            await asyncio.sleep(0.001)
        for event in app.let_go.values():
            event.set()
        await asyncio.gather(*tasks, return_exceptions=True)
        assert not through._turns._running and through._turns._free == fair.MOST

    run(scenario)
