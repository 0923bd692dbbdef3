"""The API keys' work is done in turn, whatever one key sends."""

import asyncio
import threading
import uuid
from collections import Counter
from collections.abc import Callable

import pytest

from app.http.turns import Turns
from tests.patience import PATIENCE

A, B, C = (uuid.UUID(int=number) for number in range(3))


class Work:
    """Pieces of work that last until they are let go; ``began`` lists them as they began."""

    def __init__(self) -> None:
        self.began: list[str] = []
        self.let_go: dict[str, threading.Event] = {}

    def __call__(self, name: str) -> str:
        self.began.append(name)
        assert self.let_go[name].wait(PATIENCE)
        return name

    def start(self, turns: Turns, key_id: uuid.UUID, name: str) -> "asyncio.Task[str]":
        self.let_go[name] = threading.Event()
        return asyncio.create_task(turns.run(key_id, self, name))


async def until(look: Callable[[], bool]) -> None:
    async with asyncio.timeout(PATIENCE):
        while not look():
            await asyncio.sleep(0.001)


async def follow(threads: int, arrivals: list[tuple[uuid.UUID, str]]) -> list[str]:
    """The order in which the pieces begin that arrive in this order while the first one lasts."""
    turns, work, tasks = Turns(threads), Work(), []
    for key_id, name in arrivals:
        tasks.append(work.start(turns, key_id, name))
        await asyncio.sleep(0)
        await until(lambda: bool(work.began))
    for number in range(len(arrivals)):
        await until(lambda: len(work.began) > number)  # noqa: B023
        work.let_go[work.began[number]].set()
    assert await asyncio.gather(*tasks) == [name for _, name in arrivals]
    return work.began


def test_a_flood_of_one_key_delays_another_key_by_one_piece() -> None:
    arrivals = [*((A, f"a{number}") for number in range(9)), (B, "b0"), (B, "b1"), (C, "c0")]
    began = asyncio.run(follow(1, arrivals))
    assert began == ["a0", "b0", "c0", "a1", "b1", *(f"a{number}" for number in range(2, 9))]


def test_a_key_has_one_thread() -> None:
    async def run() -> None:
        turns, work = Turns(2), Work()
        tasks = [work.start(turns, A, f"a{number}") for number in range(5)]
        await until(lambda: work.began == ["a0"])
        tasks.append(work.start(turns, B, "b"))
        await until(lambda: work.began == ["a0", "b"])
        for event in work.let_go.values():
            event.set()
        await asyncio.gather(*tasks)
        assert Counter(work.began) == Counter(work.let_go.keys())

    asyncio.run(run())


@pytest.mark.parametrize("cancelled", [0, 1])
def test_a_request_that_is_cancelled_gives_its_turn_back(cancelled: int) -> None:
    async def run() -> None:
        turns, work = Turns(1), Work()
        tasks = [work.start(turns, A, f"a{number}") for number in range(3)]
        await until(lambda: work.began == ["a0"])
        tasks[cancelled].cancel()
        for event in work.let_go.values():
            event.set()
        await asyncio.gather(*tasks, return_exceptions=True)
        assert [task.cancelled() for task in tasks] == [number == cancelled for number in range(3)]
        assert await turns.run(B, str, 1) == "1"
        assert not turns._waiting and not turns._running

    asyncio.run(run())
