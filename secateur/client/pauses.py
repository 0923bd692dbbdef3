"""How long to wait before asking again, and waiting."""

import asyncio
import random
import time

import httpx2

ATTEMPTS = 5
LONGEST = 30.0


def pause(attempt: int, response: httpx2.Response | None) -> float:
    """Seconds: what the service says (``Retry-After``), else twice as long each time, and a part by chance; at most half a minute."""
    told = response.headers.get("Retry-After", "") if response is not None else ""
    if told.isdigit():
        return min(float(told), LONGEST)
    return min(0.25 * 2.0**attempt, LONGEST) * random.uniform(0.5, 1.0)


def sleep(seconds: float) -> None:
    time.sleep(seconds)


async def async_sleep(seconds: float) -> None:
    await asyncio.sleep(seconds)
