"""Migration of a database's schema to a revision, with Alembic. Several processes may migrate at the same time."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from alembic import command
from alembic.config import Config
from alembic.script import ScriptDirectory
from sqlalchemy import Connection, NullPool, create_engine, text

import migrations

LOCK = 0x5EC47E02
"""Key of the advisory lock that allows one migration at a time."""


def upgrade(database_url: str, revision: str = "head") -> None:
    """Migrate the database up to ``revision``; do nothing if the database already has that revision."""
    with _locked(database_url) as connection:
        command.upgrade(_config(connection), revision)


def downgrade(database_url: str, revision: str) -> None:
    """Migrate the database down to ``revision``; ``base`` is the empty database."""
    with _locked(database_url) as connection:
        command.downgrade(_config(connection), revision)


def newest_revision() -> str | None:
    """Return the revision of the newest migration."""
    return ScriptDirectory.from_config(_config()).get_current_head()


@contextmanager
def _locked(database_url: str) -> Iterator[Connection]:
    """Yield a connection with the lock and one transaction, so that a failed migration leaves the schema as it was."""
    engine = create_engine(database_url, poolclass=NullPool)
    with engine.begin() as connection:
        connection.execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": LOCK})
        yield connection


def _config(connection: Connection | None = None) -> Config:
    config = Config(attributes={"connection": connection})
    config.set_main_option("script_location", str(Path(migrations.__file__).parent).replace("%", "%%"))
    return config
