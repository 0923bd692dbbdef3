"""What the API asks of the Hub: in threads of its own, in limited numbers, and once a minute for each token.

A Hub that is slow or does not answer therefore delays only the requests that need it.
"""

import hashlib
import json
import uuid
from collections.abc import Callable
from threading import Lock
from typing import Any, TypeVar

from anyio import CapacityLimiter, to_thread
from cachetools import TTLCache, cached
from cachetools.keys import hashkey

from app.http.places import SOON, Places
from app.http.problem import Problem
from secateur.catalog import hub_reads
from secateur.catalog.sources import ModelSource, locate
from secateur.contract.errors import ErrorCode

THREADS = 16
EACH = 8
"""Largest number of threads that one API key uses at a time."""
SECONDS = 60.0
"""Time for which an answer of the Hub is kept."""
MOST_ACCOUNTS = 1000
MOST_BYTES = 16 * 2**20
"""Largest number of bytes of the configs that are kept."""

_threads = CapacityLimiter(THREADS)
_held = Places(EACH)
Answer = TypeVar("Answer")


async def ask(key_id: uuid.UUID, question: Callable[[], Answer]) -> Answer:
    """Return what ``question``, a function that calls the Hub, returns for a request of this API key.

    Raises:
        Problem: 503 or 429 with ``Retry-After``: all threads are in use, or as many as one key may use.
    """
    if len(_held) >= THREADS:
        detail = f"This service is asking the Hub {THREADS} questions, as many as it may at once."
        raise Problem(503, ErrorCode.HUB_BUSY, detail, headers={"Retry-After": SOON})
    with _held.taken(key_id, "questions to the Hub"):
        return await to_thread.run_sync(question, limiter=_threads)


def _by_token(endpoint: str | None, token: str | None, *what: str | None) -> Any:
    return hashkey(endpoint, token and hashlib.sha256(token.encode()).digest(), *what)


def _size(source: ModelSource) -> int:
    return 1000 + len(json.dumps(source.config))


@cached(TTLCache(MOST_ACCOUNTS, SECONDS), key=_by_token, lock=Lock())
def whoami(endpoint: str | None, token: str) -> dict[str, Any]:
    """Return the account that ``token`` belongs to; see :func:`secateur.catalog.hub_reads.whoami`."""
    return hub_reads.whoami(endpoint, token)


@cached(TTLCache(MOST_BYTES, SECONDS, getsizeof=_size), key=_by_token, lock=Lock())
def find_model(
    endpoint: str | None, token: str | None, model_id: str, revision: str | None, gguf_file: str | None
) -> ModelSource:
    """Return the source of a model on the Hub; see :func:`secateur.catalog.sources.locate`."""
    return locate(model_id, revision=revision, gguf_file=gguf_file, token=token or False, endpoint=endpoint)


def forget() -> None:
    """Drop all kept answers."""
    whoami.cache_clear()
    find_model.cache_clear()
