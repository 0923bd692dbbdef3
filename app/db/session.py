"""Engine and session factory: one code path (sync SQLAlchemy, psycopg 3) for API, scheduler and workers."""

from functools import lru_cache

from sqlalchemy import Engine, create_engine
from sqlalchemy.orm import Session, sessionmaker

from app.config import get_settings


def make_engine(database_url: str) -> Engine:
    """An engine whose calls end: a lost database is an error within seconds, never a hang.

    ``tcp_user_timeout`` (ms) bounds a dead peer, ``statement_timeout`` (ms) a slow query; see the libpq manual,
    "Database Connection Control Functions".
    ``idle_in_transaction_session_timeout`` (ms) frees the rows that a process which froze or vanished had locked.
    """
    return create_engine(
        database_url,
        pool_pre_ping=True,
        pool_size=10,
        max_overflow=30,
        connect_args={
            "connect_timeout": 3,
            "tcp_user_timeout": 5000,
            "keepalives_idle": 5,
            "keepalives_interval": 2,
            "keepalives_count": 2,
            "options": "-c statement_timeout=10000 -c idle_in_transaction_session_timeout=15000 -c timezone=UTC",
        },
    )


@lru_cache
def session_factory() -> sessionmaker[Session]:
    """The process's session factory. Never call before a fork: connections do not survive one."""
    return sessionmaker(make_engine(get_settings().database_url), expire_on_commit=False)
