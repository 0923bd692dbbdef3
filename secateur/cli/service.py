"""The commands that run the service: they need the service's folders beside the library, and start its program.

The wheel holds the library alone. A checkout and the image also have ``app/``, ``workers/`` and ``migrations/``.
"""

import os
import re
import sys
from pathlib import Path

import typer

from secateur import __version__
from secateur.cli.common import REFUSED, stop
from secateur.extras import require

HOME = "SECATEUR_HOME"
"""The environment variable that names the folder which holds ``app/``, ``workers/`` and ``migrations/``."""
PARTS = ("app/main.py", "workers/__main__.py", "migrations/env.py")
COMMANDS = {
    "up": "Run the whole service on this machine until Ctrl-C.",
    "worker": "Run a worker, which does one job at a time.",
    "scheduler": "Run a scheduler; any number may run.",
    "migrate": "Bring the database's schema up to date.",
    "keys": "Create, list, rotate and revoke API keys.",
    "doctor": "Check everything that the service needs.",
}


def add_to(cli: typer.Typer) -> None:
    """Add a command for each of :data:`COMMANDS` to ``cli``; its arguments are those of ``python -m workers``."""
    for name, summary in COMMANDS.items():
        settings = {"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []}
        cli.command(name, help=f"{summary} (service)", context_settings=settings, add_help_option=False)(_start)


def _start(context: typer.Context) -> None:
    home = find_home()
    require("server", f"'secateur {context.info_name}'")
    path = os.pathsep.join(filter(None, (str(home), os.environ.get("PYTHONPATH"))))
    arguments = [sys.executable, "-m", "workers", str(context.info_name), *context.args]
    # The program takes the place of this process, so that signals, terminal and exit code are its own.
    os.execve(sys.executable, arguments, os.environ | {"PYTHONPATH": path})


def find_home() -> Path:
    """The folder that holds the service: ``SECATEUR_HOME``, the checkout that the library lies in, or the working folder.

    Raises:
        typer.Exit: there is none, or it is of another version than this library; the reason is printed.
    """
    named = os.environ.get(HOME)
    candidates = [Path(named)] if named else [Path(__file__).parents[2], Path.cwd()]
    for folder in candidates:
        if all((folder / part).is_file() for part in PARTS):
            found = re.search(r'^SERVICE_OF = "(.*)"$', (folder / "workers" / "__init__.py").read_text(), re.MULTILINE)
            if found is None:
                continue
            if found[1] != f"secateur {__version__}":
                message = f"The service in {folder} is of {found[1]}; the installed library is secateur {__version__}."
                raise stop(f"{message} Install the same version of both.", REFUSED)
            return folder
    where = f"{HOME}={named} names no such folder" if named else "neither this installation nor the working folder does"
    raise stop(
        "This command needs the service's folders app/, workers/ and migrations/, which are in a checkout of secateur and in "
        f"its container image; {where}. Run it there, or set {HOME} to that folder.",
        REFUSED,
    )
