"""Define the commands that run the service: ``python -m workers``.

``secateur up`` and the other service commands of ``secateur`` start this program.
"""

import json
import logging
import signal
import sys
from typing import Annotated

import typer

from app.auth.commands import keys
from app.fleet.commands import workers
from secateur.cli.common import FAILED, REFUSED, UNREACHABLE, Json, stop, variable
from secateur.extras import MissingExtra, require
from workers.roles import Role

WORKER_FLAGS = ("--without-gossip", "--without-mingle", "--without-heartbeat")

cli = typer.Typer(no_args_is_help=True, pretty_exceptions_enable=False)
cli.add_typer(keys, name="keys")
cli.add_typer(workers, name="workers")


def main() -> None:
    """Run the command line.

    An error that comes from settings, database or missing packages is printed in one line, without a traceback.
    """
    try:
        cli(prog_name="secateur")
    except MissingExtra as error:
        typer.echo(error.message, err=True)
        sys.exit(REFUSED)
    except Exception as error:
        explained = _explain(error)
        if explained is None:
            raise
        message, code = explained
        typer.echo(message, err=True)
        sys.exit(code)


def _explain(error: Exception) -> tuple[str, int] | None:
    """Return what to tell the operator, and the exit code; return ``None`` for a defect of the service."""
    from psycopg.errors import UndefinedColumn, UndefinedTable
    from pydantic import ValidationError
    from sqlalchemy.exc import OperationalError, ProgrammingError

    from app.config import Settings

    if isinstance(error, ValidationError) and error.title == Settings.__name__:
        reasons = [f"{variable(str(item['loc'][0]))}: {item['msg']}" for item in error.errors()]
        return "\n".join(reasons), REFUSED
    if isinstance(error, OperationalError):
        return f"The database cannot be reached: {error.orig}", UNREACHABLE
    if isinstance(error, ProgrammingError) and isinstance(error.orig, UndefinedTable | UndefinedColumn):
        return "The database's schema is not up to date: run 'secateur migrate'.", REFUSED
    return None


@cli.command()
def up(
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[
        int | None, typer.Option(min=1, max=65535, help="Unset: 8000, or a free one when that is taken.")
    ] = None,
) -> None:
    """Run the whole service on this machine until Ctrl-C: database, broker, API, scheduler and worker.

    All data of the service is in the folder SECATEUR_DATA_DIR (default: .secateur). Models are published to the folder
    SECATEUR_HUB_DIR (default: the folder hub in the data folder).
    """
    require("engine", "'secateur up'")
    from app.config import get_settings
    from workers.embedded import EmbeddedError
    from workers.stack import Stack, StackError

    logging.basicConfig(format="%(asctime)s %(levelname)s %(message)s")
    settings = get_settings()
    stack = Stack(settings.data_dir, settings.hub_dir or settings.data_dir / "hub", host, port)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda *_: stack.end())
    try:
        with stack:
            typer.echo(f"Secateur is running at {stack.url}")
            typer.echo(f"  web page       {stack.url}/#key={stack.api_key}")
            typer.echo(f"  documentation  {stack.url}/docs")
            typer.echo(f"  API key        {stack.api_key}")
            typer.echo(f"  data           {stack.folder}")
            typer.echo("Ctrl-C stops it.")
            stack.run()
    except (StackError, EmbeddedError, OSError) as error:
        raise stop(str(error), FAILED) from None


@cli.command()
def scheduler() -> None:
    """Run a scheduler. Any number of schedulers may run at the same time."""
    from app.config import get_settings
    from app.db.session import session_factory
    from app.http import logs
    from workers.scheduler import run

    logs.configure(get_settings())
    run(get_settings(), session_factory())


@cli.command()
def worker() -> None:
    """Run a worker, which does one job at a time.

    Run one worker for each GPU; the variable CUDA_VISIBLE_DEVICES chooses the GPU of a worker.
    """
    require("engine", "A worker")
    from workers.celery_app import WORKER_NAME, app

    app.worker_main(["worker", "--loglevel", "INFO", "--hostname", f"secateur-{WORKER_NAME}", *WORKER_FLAGS])


@cli.command()
def doctor(as_json: Json = False) -> None:
    """Check everything that the service needs.

    The exit code is 1 if a check fails. Warnings do not change the exit code.
    """
    from app.config import get_settings
    from workers.doctor import examine

    findings = []
    for finding in examine(get_settings()):
        findings.append(finding)
        if not as_json:
            typer.echo(f"{finding.verdict:8} {finding.part}: {finding.found}")
            if finding.advice:
                typer.echo(f"         -> {finding.advice}")
    if as_json:
        typer.echo(json.dumps([finding.as_dict() for finding in findings]))
    if any(finding.verdict == "failed" for finding in findings):
        raise typer.Exit(FAILED)


@cli.command()
def health(
    role: Annotated[Role, typer.Argument(help="The role of the process to check.")],
    url: Annotated[str, typer.Option(help="Address of the API on this host.")] = "http://127.0.0.1:8000",
) -> None:
    """Check that the process of a role on this host does its work. This command is for containers.

    The exit code is 1 if the process does not do its work.
    """
    from app.config import get_settings
    from workers.health import Unhealthy, check

    try:
        typer.echo(check(role, get_settings(), url))
    except Unhealthy as error:
        raise stop(str(error), FAILED) from None


@cli.command()
def migrate() -> None:
    """Bring the database's schema up to date."""
    from app.config import get_settings
    from app.db.migrate import upgrade

    upgrade(get_settings().nearest_database_url())
    typer.echo("The schema is up to date.")


if __name__ == "__main__":
    main()
