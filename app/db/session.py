"""Database engine and session factory: the API, the scheduler and the workers share one code path (sync SQLAlchemy,
psycopg 3)."""

import select
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

from sqlalchemy import Engine, create_engine, event
from sqlalchemy.exc import InvalidatePoolError
from sqlalchemy.orm import Session, sessionmaker

from app.config import get_settings

POOL_TIMEOUT = 2.0
"""Number of seconds after which a thread that finds no free connection gives up; the API then answers 503."""


def make_engine(database_url: str, pool_size: int = 5) -> Engine:
    """Return an engine whose calls always end: a lost database causes an error within seconds and never a hang.

    ``tcp_user_timeout`` (ms) limits the wait for a dead peer, and ``statement_timeout`` (ms) limits a slow query; see
    the libpq manual, "Database Connection Control Functions". ``idle_in_transaction_session_timeout`` (ms) frees the
    rows that a frozen or vanished process had locked. A thread that waits longer than ``POOL_TIMEOUT`` seconds for one of
    the ``pool_size`` connections gets SQLAlchemy's ``TimeoutError``. Connections are opened when they are needed.
    """
    engine = create_engine(
        database_url,
        pool_size=pool_size,
        max_overflow=0,  # connections beyond the pool would be opened anew for every request
        pool_timeout=POOL_TIMEOUT,
        connect_args={
            "connect_timeout": 3,
            "tcp_user_timeout": 5000,
            "keepalives_idle": 5,
            "keepalives_interval": 2,
            "keepalives_count": 2,
            "options": "-c statement_timeout=10000 -c idle_in_transaction_session_timeout=15000 -c timezone=UTC",
        },
    )
    event.listen(engine, "checkout", _refuse_lost)
    return engine


def _refuse_lost(connection: Any, *_: object) -> None:
    """Make the pool reconnect if the server closed the connection; the check polls the socket, without a round trip."""
    socket = select.poll()
    socket.register(connection.fileno(), select.POLLIN)
    if socket.poll(0):  # an idle connection becomes readable only when the server closes it
        raise InvalidatePoolError()


@lru_cache
def session_factory() -> sessionmaker[Session]:
    """Return the process's session factory. Never call this before a fork: connections do not survive a fork."""
    settings = get_settings()
    return sessionmaker(make_engine(settings.database_url, settings.database_pool), expire_on_commit=False)


@contextmanager
def reading() -> Iterator[Session]:
    """Yield a session without a transaction: every query sees all committed data, and no round trips for BEGIN and
    ROLLBACK are needed."""
    with session_factory()() as session:
        session.connection(execution_options={"isolation_level": "AUTOCOMMIT"})
        yield session
