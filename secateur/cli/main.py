"""The entry point of the console script ``secateur``."""

import sys
from typing import Annotated

import typer
from pydantic import ValidationError

from secateur import __version__
from secateur.cli import jobs, prune, service
from secateur.cli.common import REFUSED, variable
from secateur.extras import MissingExtra

cli = typer.Typer(no_args_is_help=True, pretty_exceptions_enable=False)


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"secateur {__version__}")
        raise typer.Exit


@cli.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Structured pruning of large language models, on this machine or by a service."""


for command in (
    prune.prune, prune.inspect, jobs.submit, jobs.jobs, jobs.status, jobs.logs, jobs.watch, jobs.cancel, jobs.delete, jobs.label,
    jobs.recipe, jobs.metrics, jobs.usage, jobs.models, jobs.texts, jobs.tasks,
):  # fmt: skip
    cli.command()(command)
cli.add_typer(jobs.datasets, name="datasets")
service.add_to(cli)


def main() -> None:
    """Run the command line; a wrong setting or a missing extra is reported in one line, without a traceback."""
    try:
        cli()
    except MissingExtra as error:
        typer.echo(error.message, err=True)
        sys.exit(REFUSED)
    except ValidationError as error:
        if error.title != "LibrarySettings":
            raise
        for item in error.errors():
            typer.echo(f"{variable(str(item['loc'][0]))}: {item['msg']}", err=True)
        sys.exit(REFUSED)


if __name__ == "__main__":
    main()
