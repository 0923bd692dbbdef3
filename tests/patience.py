"""Waiting for what must happen. Only a test that fails anyway waits to the end, so the end may be far away."""

import time
from collections.abc import Callable
from typing import TypeVar

import httpx2
from sqlalchemy import Engine, create_engine

T = TypeVar("T")
PATIENCE = 240.0
"""Seconds. A machine that is busy with something else needs many times as long as an idle one; no test depends on it."""


def wait_for(look: Callable[[], T], timeout: float = PATIENCE) -> T:
    """Call ``look`` again and again, and return what it returns as soon as that is true."""
    deadline = time.monotonic() + timeout
    while True:
        found = look()
        if found:
            return found
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.05)


def patient_engine(database_url: str) -> Engine:
    """An engine for a test's own sessions: unlike the service's, the server does not end one that is idle for 15 seconds."""
    return create_engine(database_url, connect_args={"options": "-c timezone=UTC"})


def make_http_requests_patient() -> None:
    """Replace the 5 seconds after which a request of httpx2 that names no timeout of its own gives up."""
    for part in ("connect", "read", "write", "pool"):
        setattr(httpx2._config.DEFAULT_TIMEOUT_CONFIG, part, PATIENCE)
