"""How often an API key may ask: windows of fixed length, counted in the broker for all replicas of the API (library ``limits``).

The answer's headers are those of draft-ietf-httpapi-ratelimit-headers-10.
"""

import logging
import math
import threading
import time
import uuid
from functools import lru_cache
from typing import Any

from limits import parse
from limits.errors import StorageError
from limits.storage import RedisStorage

from app.config import Settings
from app.http.problem import Problem
from secateur.contract.errors import ErrorCode

log = logging.getLogger(__name__)

BROKER_SECONDS = 1.0
SHARES = 100
"""A process takes this part of a limit at a time, so that few requests cost a round trip. What it does not use is lost to the
other replicas until the window ends."""


@lru_cache
def _counters(broker_url: str) -> RedisStorage:
    options: dict[str, Any] = {"socket_timeout": BROKER_SECONDS, "socket_connect_timeout": BROKER_SECONDS}
    return RedisStorage(broker_url, wrap_exceptions=True, **options)


class _Taken:
    """What this process has taken of the limits in one window, and not used yet: for each key this, and what all have taken."""

    def __init__(self, window: float) -> None:
        self.window = window
        self.shares: dict[uuid.UUID, tuple[int, int]] = {}


_lock = threading.Lock()
_taken = _Taken(0.0)


def _use_own(window: float, key_id: uuid.UUID) -> tuple[int, int] | None:
    """Use one of what was taken for this key; what is left of it, and what all replicas have taken. ``None``: nothing was left."""
    global _taken
    with _lock:
        if _taken.window != window:
            _taken = _Taken(window)
        own, used = _taken.shares.get(key_id, (0, 0))
        if own == 0:
            return None
        _taken.shares[key_id] = own - 1, used
        return own - 1, used


def _keep(window: float, key_id: uuid.UUID, own: int, used: int) -> None:
    with _lock:
        if _taken.window == window:
            earlier, _ = _taken.shares.get(key_id, (0, 0))
            _taken.shares[key_id] = earlier + own, used


def count(settings: Settings, key_id: uuid.UUID) -> dict[str, str]:
    """Count a request of this key; the headers that tell what is left. None while the broker is away: it limits nobody then.

    Raises:
        Problem: 429 with ``Retry-After``, when there is nothing left.
    """
    if not settings.rate_limit:
        return {}
    limit = parse(settings.rate_limit)
    length = limit.get_expiry()
    window, passed = divmod(time.time(), length)
    own, used = _use_own(window, key_id) or (-1, 0)
    if own < 0:
        share = max(limit.amount // SHARES, 1)
        try:
            used = _counters(settings.broker_url).incr(f"rate/{key_id}/{window:.0f}", length, share)
        except StorageError as error:
            log.warning("requests are not limited, the broker does not answer: %s", error)
            return {}
        own = min(share, limit.amount - used + share) - 1
        if own > 0:
            _keep(window, key_id, own, used)
    seconds = math.ceil(length - passed)
    headers = {
        "RateLimit-Policy": f'"key";q={limit.amount};w={length}',
        "RateLimit": f'"key";r={max(limit.amount - used, 0) + max(own, 0)};t={seconds}',
    }
    if own < 0:
        detail = f"This API key may ask {limit.amount} times in {length} seconds."
        raise Problem(429, ErrorCode.RATE_LIMITED, detail, headers=headers | {"Retry-After": str(seconds)})
    return headers
