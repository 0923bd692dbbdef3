"""The commands that run the service; a command starts the service's program from the service's folders.

The wheel contains the library only. A checkout and the container image also contain ``app/``, ``workers/`` and
``migrations/``.
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
"""The environment variable that names the folder with ``app/``, ``workers/`` and ``migrations/``."""
PARTS = ("app/main.py", "workers/__main__.py", "migrations/env.py")
COMMANDS = {
    "up": "Run the whole service on this machine until Ctrl-C.",
    "worker": "Run a worker, which does one job at a time.",
    "scheduler": "Run a scheduler; any number may run.",
    "migrate": "Bring the database's schema up to date.",
    "keys": "Create, list, change, rotate and revoke API keys.",
    "workers": "List, drain and resume workers.",
    "doctor": "Check everything that the service needs.",
}


def add_to(cli: typer.Typer) -> None:
    """Add a command for each of :data:`COMMANDS` to ``cli``; the arguments are those of ``python -m workers``."""
    for name, summary in COMMANDS.items():
        settings = {"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []}
        cli.command(name, help=f"{summary} (service)", context_settings=settings, add_help_option=False)(_start)


def _start(context: typer.Context) -> None:
    home = find_home()
    require("server", f"'secateur {context.info_name}'")
    path = os.pathsep.join(filter(None, (str(home), os.environ.get("PYTHONPATH"))))
    arguments = [sys.executable, "-m", "workers", str(context.info_name), *context.args]
    # The program replaces this process, so that signals, terminal and exit code are the program's own.
    os.execve(sys.executable, arguments, os.environ | {"PYTHONPATH": path})


def find_home() -> Path:
    """Return the folder that holds the service.

    The folder is ``SECATEUR_HOME``, or else the checkout that contains the library, or else the working folder.

    Raises:
        typer.Exit: No folder holds the service, or the service has another version than this library; the reason is
            printed.
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
