"""Rate limits of API keys: the broker counts requests in windows of fixed length for all replicas of the API.

The counting uses the library ``limits``. The answer's headers follow draft-ietf-httpapi-ratelimit-headers-10.
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
"""Number of shares into which a limit is divided; a process reserves one share at a time, so that few requests cost a
round trip to the broker. Other replicas cannot use the unused rest of a share until the window ends."""


@lru_cache
def _counters(broker_url: str) -> RedisStorage:
    options: dict[str, Any] = {"socket_timeout": BROKER_SECONDS, "socket_connect_timeout": BROKER_SECONDS}
    return RedisStorage(broker_url, wrap_exceptions=True, **options)


class _Taken:
    """The requests that this process has reserved in one window and not yet used.

    ``shares`` maps each API key to the number of unused requests and the number that all replicas have reserved.
    """

    def __init__(self, window: float) -> None:
        self.window = window
        self.shares: dict[uuid.UUID, tuple[int, int]] = {}


_lock = threading.Lock()
_taken = _Taken(0.0)


def _use_own(window: float, key_id: uuid.UUID) -> tuple[int, int] | None:
    """Use one of the requests that this process has reserved for the API key, or return ``None`` if there is none.

    Return the number of reserved requests left and the number that all replicas have reserved.
    """
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
    """Count a request of this API key and return the headers that tell how many requests are left.

    Return no headers if no limit is set or the broker does not answer; then no request is limited.

    Raises:
        Problem: 429 with ``Retry-After`` if no request is left in the window.
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
