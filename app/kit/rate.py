"""How often an API key may ask: windows of fixed length, counted in the broker for all replicas of the API (library ``limits``).

The answer's headers are those of draft-ietf-httpapi-ratelimit-headers-10.
"""

import logging
import math
import time
import uuid
from functools import lru_cache
from typing import Any

from limits import parse
from limits.errors import StorageError
from limits.storage import RedisStorage

from app.config import Settings
from app.kit.problem import Problem

log = logging.getLogger(__name__)

BROKER_SECONDS = 1.0


@lru_cache
def _counters(broker_url: str) -> RedisStorage:
    options: dict[str, Any] = {"socket_timeout": BROKER_SECONDS, "socket_connect_timeout": BROKER_SECONDS}
    return RedisStorage(broker_url, wrap_exceptions=True, **options)


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
    try:
        used = _counters(settings.broker_url).incr(f"rate/{key_id}/{window:.0f}", length)
    except StorageError as error:
        log.warning("requests are not limited, the broker does not answer: %s", error)
        return {}
    seconds = math.ceil(length - passed)
    headers = {
        "RateLimit-Policy": f'"key";q={limit.amount};w={length}',
        "RateLimit": f'"key";r={max(limit.amount - used, 0)};t={seconds}',
    }
    if used > limit.amount:
        detail = f"This API key may ask {limit.amount} times in {length} seconds."
        raise Problem(429, "rate_limited", detail, headers=headers | {"Retry-After": str(seconds)})
    return headers
