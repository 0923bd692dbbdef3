"""Migration of a database's schema to a revision, with Alembic. Several processes may migrate at the same time."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from alembic import command
from alembic.config import Config
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import Connection, NullPool, create_engine, text

import migrations

MIGRATE = "The database's schema is not up to date: run 'secateur migrate'."
LOCK = 0x5EC47E02
"""Key of the advisory lock that allows one migration at a time."""
CONNECT_SECONDS = 3


class SchemaError(Exception):
    """The database's schema is of another version of the service; the message says what to do."""


def check_schema(database_url: str) -> None:
    """Check that the database has the schema of this version.

    Raises:
        SchemaError: the schema is older or newer.
        sqlalchemy.exc.OperationalError: the database does not answer.
    """
    engine = create_engine(database_url, poolclass=NullPool, connect_args={"connect_timeout": CONNECT_SECONDS})
    with engine.connect() as connection:
        found = _known_revision(connection)
    if found != newest_revision():
        raise SchemaError(MIGRATE)


def _known_revision(connection: Connection) -> str | None:
    """Return the revision of the database's schema, or ``None`` for a database without a schema.

    Raises:
        SchemaError: the schema was made by a newer version.
    """
    found = MigrationContext.configure(connection).get_current_revision()
    known = {script.revision for script in ScriptDirectory.from_config(_config()).walk_revisions()}
    if found is not None and found not in known:
        raise SchemaError(
            f"The database's schema is of a newer version of Secateur: this version does not know its revision '{found}', only "
            f"those up to '{newest_revision()}'. Install the newer version, or restore a backup from before the upgrade."
        )
    return found


def upgrade(database_url: str, revision: str = "head") -> None:
    """Migrate the database up to ``revision``; do nothing if the database already has that revision.

    Raises:
        SchemaError: the schema was made by a newer version.
    """
    with _locked(database_url) as connection:
        _known_revision(connection)
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
