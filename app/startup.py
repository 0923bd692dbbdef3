"""What every process of the service checks before it starts: the settings, the data folder and the database's schema.

A process that cannot start says so in one sentence and ends with an exit code; there is no traceback.
"""

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from psycopg.errors import UndefinedColumn, UndefinedTable
from pydantic import ValidationError
from sqlalchemy.exc import OperationalError, ProgrammingError

from app import data_folder, tracing
from app.config import Settings
from app.data_folder import DataFolderError
from app.db.migrate import MIGRATE, SchemaError, check_schema
from secateur.cli.common import REFUSED, UNREACHABLE, variable
from secateur.extras import MissingExtra

log = logging.getLogger(__name__)


def check(settings: Settings, *, owns_folder: bool) -> None:
    """Check that a process with these settings may start; ``owns_folder`` says that it writes to the data folder.

    A database that does not answer is no reason to refuse: the process waits for it, as for one that is lost later.

    Raises:
        MissingExtra: a setting needs packages that are not installed.
        DataFolderError, SchemaError: the data folder or the schema is of another version.
    """
    tracing.check(settings)
    (data_folder.claim if owns_folder else data_folder.check)(settings.data_dir)
    try:
        check_schema(settings.database_url)
    except OperationalError as error:
        log.warning("the database does not answer, so its schema is not checked: %s", str(error.orig).strip())


@contextmanager
def refusing() -> Iterator[None]:
    """End the process with one sentence on stderr and an exit code if the block raises an error that is explained."""
    try:
        yield
    except Exception as error:
        explained = explain(error)
        if explained is None:
            raise
        message, code = explained
        print(message, file=sys.stderr)
        raise SystemExit(code) from None


def explain(error: Exception) -> tuple[str, int] | None:
    """Return what to tell the operator, and the exit code; return ``None`` for a defect of the service."""
    if isinstance(error, ValidationError) and error.title == Settings.__name__:
        return "\n".join(_reason(item["loc"], item["msg"]) for item in error.errors()), REFUSED
    if isinstance(error, MissingExtra):
        return error.message, REFUSED
    if isinstance(error, DataFolderError | SchemaError):
        return str(error), REFUSED
    if isinstance(error, OperationalError):
        return f"The database cannot be reached: {str(error.orig).strip()}", UNREACHABLE
    if isinstance(error, ProgrammingError) and isinstance(error.orig, UndefinedTable | UndefinedColumn):
        return MIGRATE, REFUSED
    return None


def _reason(location: tuple[int | str, ...], message: str) -> str:
    """Return what is wrong with one setting, or with several that contradict each other and have no location."""
    message = message.removeprefix("Value error, ")
    return f"{variable(str(location[0]))}: {message}" if location else f"{message}."
