"""What the commands share: exit codes, options, and the end of a command that cannot go on."""

import uuid
from typing import Annotated

import typer

FAILED, REFUSED, UNREACHABLE, INTERRUPTED = 1, 2, 3, 130
"""Exit codes: the job failed or was cancelled; refused or misused; the service or its database cannot be reached; Ctrl-C."""

Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
JobId = Annotated[uuid.UUID, typer.Argument(help="The job's id.")]


def stop(message: str, code: int) -> typer.Exit:
    """Print ``message`` on stderr; the exception to raise to end the command with the exit code ``code``."""
    typer.echo(message, err=True)
    return typer.Exit(code)


def variable(field: str) -> str:
    """The environment variable of the setting ``field``; a setting with an alias is named by the alias already."""
    return field if field.isupper() else f"SECATEUR_{field.upper()}"
