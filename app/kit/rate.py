"""How often an API key may ask: a window in the broker, shared by all replicas of the API (library ``limits``).

The answer's headers are those of draft-ietf-httpapi-ratelimit-headers-10.
"""

import logging
import math
import time
import uuid
from functools import lru_cache
from typing import Any

from limits import RateLimitItem, parse
from limits.errors import StorageError
from limits.storage import RedisStorage
from limits.strategies import SlidingWindowCounterRateLimiter

from app.config import Settings
from app.kit.problem import Problem

log = logging.getLogger(__name__)

BROKER_SECONDS = 1.0


@lru_cache
def _limiter(broker_url: str) -> SlidingWindowCounterRateLimiter:
    options: dict[str, Any] = {"socket_timeout": BROKER_SECONDS, "socket_connect_timeout": BROKER_SECONDS}
    return SlidingWindowCounterRateLimiter(RedisStorage(broker_url, wrap_exceptions=True, **options))


def count(settings: Settings, key_id: uuid.UUID) -> dict[str, str]:
    """Count a request of this key; the headers that tell what is left. None while the broker is away: it limits nobody then.

    Raises:
        Problem: 429 with ``Retry-After``, when there is nothing left.
    """
    if not settings.rate_limit:
        return {}
    limit, limiter = parse(settings.rate_limit), _limiter(settings.broker_url)
    try:
        allowed = limiter.hit(limit, str(key_id))
        reset, remaining = limiter.get_window_stats(limit, str(key_id))
    except StorageError as error:
        log.warning("requests are not limited, the broker does not answer: %s", error)
        return {}
    headers = _headers(limit, remaining, math.ceil(max(reset - time.time(), 0)))
    if not allowed:
        seconds = math.ceil(max(reset - time.time(), 1))
        detail = f"This API key may ask {limit.amount} times in {limit.get_expiry()} seconds."
        raise Problem(429, "rate_limited", detail, headers=headers | {"Retry-After": str(seconds)})
    return headers


def _headers(limit: RateLimitItem, remaining: int, seconds: int) -> dict[str, str]:
    return {
        "RateLimit-Policy": f'"key";q={limit.amount};w={limit.get_expiry()}',
        "RateLimit": f'"key";r={remaining};t={seconds}',
    }
