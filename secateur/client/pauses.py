"""The pauses between the attempts of a request."""

import asyncio
import random
import time

import httpx2

ATTEMPTS = 5
LONGEST = 30.0


def pause(attempt: int, response: httpx2.Response | None) -> float:
    """Return the pause before the next attempt, in seconds, at most 30.

    The pause is the value of ``Retry-After``. Without this header, the pause doubles with each attempt and is
    multiplied by a random factor from 0.5 to 1.
    """
    told = response.headers.get("Retry-After", "") if response is not None else ""
    if told.isdigit():
        return min(float(told), LONGEST)
    return min(0.25 * 2.0**attempt, LONGEST) * random.uniform(0.5, 1.0)


def sleep(seconds: float) -> None:
    time.sleep(seconds)


async def async_sleep(seconds: float) -> None:
    await asyncio.sleep(seconds)
