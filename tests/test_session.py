"""Connections that the server closed are replaced before anyone meets them; reading holds no transaction."""

import psycopg
from sqlalchemy import text

from app.config import Settings
from app.db.session import reading, session_factory


def test_a_connection_that_the_server_closed_is_replaced(settings: Settings) -> None:
    with session_factory()() as first, session_factory()() as second:
        for session in (first, second):
            session.execute(text("SELECT 1"))
    with psycopg.connect(settings.database_url.replace("+psycopg", ""), autocommit=True) as connection:
        connection.execute(
            "SELECT pg_terminate_backend(pid, 60000) FROM pg_stat_activity"
            " WHERE datname = current_database() AND pid <> pg_backend_pid()"
        )
    for _ in range(2):
        with session_factory()() as session:
            assert session.scalar(text("SELECT 1")) == 1


def test_reading_holds_no_transaction_and_leaves_none_behind(settings: Settings) -> None:
    started = text("SELECT now() <> statement_timestamp()")
    with reading() as session:
        for _ in range(3):
            assert session.scalar(started) is False
    with session_factory()() as session:
        session.execute(text("SELECT 1"))
        assert session.scalar(started) is True
