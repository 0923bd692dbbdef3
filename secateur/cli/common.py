"""The definitions that the commands share: exit codes, options, and the end of a command that cannot continue."""

import uuid
from typing import Annotated

import typer

FAILED, REFUSED, UNREACHABLE, INTERRUPTED = 1, 2, 3, 130
"""The exit codes of the commands.

``FAILED``: the job failed or was cancelled. ``REFUSED``: the request was refused, or the command was used wrongly.
``UNREACHABLE``: the service or its database cannot be reached. ``INTERRUPTED``: the user pressed Ctrl-C.
"""

Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
JobId = Annotated[uuid.UUID, typer.Argument(help="The job's id.")]


def stop(message: str, code: int) -> typer.Exit:
    """Print ``message`` on stderr, and return the exception that ends the command with the exit code ``code``."""
    typer.echo(message, err=True)
    return typer.Exit(code)


def variable(field: str) -> str:
    """Return the environment variable of the setting ``field``; for a setting with an alias, ``field`` is the alias."""
    return field if field.isupper() else f"SECATEUR_{field.upper()}"
