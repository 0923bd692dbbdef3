"""Define the commands that run the service: ``python -m workers``.

``secateur up`` and the other service commands of ``secateur`` start this program.
"""

import json
import logging
import signal
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from app.auth.commands import keys
from app.fleet.commands import workers
from app.startup import refusing
from secateur.cli.common import FAILED, REFUSED, Json, stop
from secateur.extras import require
from workers.roles import Role

if TYPE_CHECKING:
    from app.config import Settings


class Place(StrEnum):
    """A place to which ``secateur up`` publishes models."""

    HUB = "hub"
    FOLDER = "folder"


WORKER_FLAGS = ("--without-gossip", "--without-mingle", "--without-heartbeat")

cli = typer.Typer(no_args_is_help=True, pretty_exceptions_enable=False)
cli.add_typer(keys, name="keys")
cli.add_typer(workers, name="workers")


def main() -> None:
    """Run the command line.

    An error that comes from settings, database or missing packages is printed in one line, without a traceback.
    """
    with refusing():
        cli(prog_name="secateur")


@cli.command()
def up(
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[
        int | None, typer.Option(min=1, max=65535, help="Unset: 8000, or a free one when that is taken.")
    ] = None,
    publish: Annotated[
        Place | None, typer.Option(help="Where models are published. With a Hub token, say which; else: folder.")
    ] = None,
) -> None:
    """Run the whole service on this machine until Ctrl-C: database, broker, API, scheduler and worker.

    All data of the service is in the folder SECATEUR_DATA_DIR (default: .secateur). Models are published to the Hub, or
    to the folder SECATEUR_HUB_DIR (default: the folder hub in the data folder).
    """
    require("engine", "'secateur up'")
    from app import tracing
    from app.config import get_settings
    from workers.embedded import EmbeddedError
    from workers.stack import API_KEY_FILE, Stack, StackError

    logging.basicConfig(format="%(asctime)s %(levelname)s %(message)s")
    settings = get_settings()
    tracing.check(settings)
    stack = Stack(settings.data_dir, _hub_folder(settings, publish), host, port)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda *_: stack.end())
    try:
        with stack:
            typer.echo(f"Secateur is running at {stack.url}")
            typer.echo(f"  web page       {stack.url}/{f'#key={stack.api_key}' if stack.key_is_new else ''}")
            typer.echo(f"  documentation  {stack.url}/docs")
            if stack.key_is_new:
                typer.echo(f"  API key        {stack.api_key}")
                typer.echo("                 which is shown this once; later starts say where it is kept")
            else:
                typer.echo(
                    f"  API key        in {stack.folder / API_KEY_FILE}; 'secateur keys create NAME' makes another"
                )
            typer.echo(f"  publishes to   {stack.hub_dir or 'the Hub'}")
            typer.echo(f"  data           {stack.folder}")
            typer.echo("Ctrl-C stops it.")
            stack.run()
    except (StackError, EmbeddedError, OSError) as error:
        raise stop(str(error), FAILED) from None


def _hub_folder(settings: "Settings", place: Place | None) -> Path | None:
    """Return the folder to which ``secateur up`` publishes models, or ``None`` for the Hub.

    Raises:
        typer.Exit: the choice is missing although there is a Hub token, or it contradicts the settings; the reason is
            printed.
    """
    if place is Place.HUB and settings.hub_dir is not None:
        raise stop("--publish hub contradicts SECATEUR_HUB_DIR, which names a folder: leave one of them out.", REFUSED)
    if place is None and settings.hub_dir is None and settings.hf_token is not None:
        reason = "There is a Hub token (HF_TOKEN), so say where models are published:"
        choices = "'--publish hub' (the Hub), '--publish folder' (a folder of this machine), or SECATEUR_HUB_DIR"
        raise stop(f"{reason} {choices}.", REFUSED)
    return None if place is Place.HUB else settings.hub_dir or settings.data_dir / "hub"


@cli.command()
def scheduler() -> None:
    """Run a scheduler. Any number of schedulers may run at the same time."""
    from app.config import get_settings
    from app.db.session import session_factory
    from app.http import logs
    from app.startup import check
    from workers.scheduler import run

    logs.configure(get_settings())
    check(get_settings(), owns_folder=False)
    _join_storage()
    run(get_settings(), session_factory())


@cli.command()
def worker() -> None:
    """Run a worker, which does one job at a time.

    Run one worker for each GPU; the variable CUDA_VISIBLE_DEVICES chooses the GPU of a worker.
    """
    require("engine", "A worker")
    from app.config import get_settings
    from app.startup import check

    check(get_settings(), owns_folder=True)
    _join_storage()
    from workers.celery_app import WORKER_NAME, app

    app.worker_main(["worker", "--loglevel", "INFO", "--hostname", f"secateur-{WORKER_NAME}", *WORKER_FLAGS])


def _join_storage() -> None:
    """Refuse to start on an object store that is not the service's."""
    from app.config import get_settings
    from app.db.session import session_factory
    from app.storage.service import StorageMismatch
    from workers.joining import join_storage

    try:
        join_storage(get_settings(), session_factory())
    except StorageMismatch as error:
        raise stop(str(error), REFUSED) from None
    session_factory().kw["bind"].dispose()
    session_factory.cache_clear()  # connections do not survive the forks of a worker


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
    from app import data_folder
    from app.config import get_settings
    from app.db.migrate import upgrade

    settings = get_settings().nearest()
    data_folder.check(settings.data_dir)
    upgrade(settings.database_url)
    typer.echo("The schema is up to date.")


if __name__ == "__main__":
    main()
