"""Engine and session factory: one code path (sync SQLAlchemy, psycopg 3) for API, scheduler and workers."""

import select
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

from sqlalchemy import Engine, create_engine, event
from sqlalchemy.exc import InvalidatePoolError
from sqlalchemy.orm import Session, sessionmaker

from app.config import get_settings


def make_engine(database_url: str) -> Engine:
    """An engine whose calls end: a lost database is an error within seconds, never a hang.

    ``tcp_user_timeout`` (ms) bounds a dead peer, ``statement_timeout`` (ms) a slow query; see the libpq manual,
    "Database Connection Control Functions".
    ``idle_in_transaction_session_timeout`` (ms) frees the rows that a process which froze or vanished had locked.
    """
    engine = create_engine(
        database_url,
        pool_size=40,  # as many as uvicorn has threads: one beyond would be made anew for every request
        max_overflow=0,
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
    """Have the pool connect anew when the server closed the connection; asks the socket, which costs no round trip."""
    socket = select.poll()
    socket.register(connection.fileno(), select.POLLIN)
    if socket.poll(0):  # an idle connection has nothing to say but that it ends
        raise InvalidatePoolError()


@lru_cache
def session_factory() -> sessionmaker[Session]:
    """The process's session factory. Never call before a fork: connections do not survive one."""
    return sessionmaker(make_engine(get_settings().database_url), expire_on_commit=False)


@contextmanager
def reading() -> Iterator[Session]:
    """A session without a transaction: every query sees what is committed, and BEGIN and ROLLBACK cost no round trips."""
    with session_factory()() as session:
        session.connection(execution_options={"isolation_level": "AUTOCOMMIT"})
        yield session
