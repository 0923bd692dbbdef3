"""Make fresh environments for the tests of the distribution.

The module provides a copy of what is packed, a wheel, a virtual environment, and commands in that environment. Only the
standard library is imported, so that any Python can run these tests without an installation of the project.
"""

import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).parents[1]
CONSTRAINTS = ROOT / "constraints.txt"
NOT_PASSED_ON = ("PYTHON", "SECATEUR_", "VIRTUAL_ENV", "MAKE")
"""Prefixes of the names of environment variables that could lead a child process back into the checkout."""


class Failure(Exception):
    """The distribution is not as it should be; the message says what was found."""


def check(holds: bool, otherwise: str) -> None:
    """Raise :class:`Failure` with the message ``otherwise`` unless ``holds``."""
    if not holds:
        raise Failure(otherwise)


@contextmanager
def step(title: str) -> Iterator[None]:
    """Print ``title`` and, at the end, the seconds that the step took."""
    print(f"{title} ...", flush=True)
    began = time.monotonic()
    yield
    print(f"{title}: {time.monotonic() - began:.0f} s", flush=True)


def main(test: Callable[[], None]) -> None:
    """Run ``test``; a failure ends the process with one line and exit code 1."""
    try:
        test()
    except Failure as failure:
        sys.exit(f"FAILED: {failure}")
    print("passed")


def environment(changes: Mapping[str, str] | None = None) -> dict[str, str]:
    """Return the variables of this process, with ``changes``.

    Variables that name the checkout or its settings are left out.
    """
    kept = {name: value for name, value in os.environ.items() if not name.startswith(NOT_PASSED_ON)}
    return kept | {"PYTHONUNBUFFERED": "1", **(changes or {})}


def run(
    argv: Sequence[str | Path], folder: Path, *, code: int = 0, changes: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """Run ``argv`` in ``folder`` and return what the command printed.

    Raises:
        Failure: the exit code of the command is not ``code``.
    """
    done = subprocess.run(argv, cwd=folder, env=environment(changes), capture_output=True, text=True)
    if done.returncode != code:
        command = " ".join(map(str, argv))
        raise Failure(f"'{command}' ended with exit code {done.returncode}:\n{done.stdout}\n{done.stderr}")
    return done


class Venv:
    """A new virtual environment that holds nothing but pip, made by the interpreter that runs this script."""

    def __init__(self, folder: Path) -> None:
        run([sys.executable, "-m", "venv", folder], folder.parent)
        self.folder = folder
        self.bin = folder / "bin"
        self.python = self.bin / "python"

    def install(self, *requirements: str) -> None:
        """Install ``requirements`` in the versions of ``constraints.txt``."""
        # Bytecode is compiled at the first import, because most of what is installed is never imported.
        options = ["--quiet", "--disable-pip-version-check", "--no-compile", "--constraint", str(CONSTRAINTS)]
        run([self.python, "-m", "pip", "install", *options, *requirements], self.folder)

    def has(self, *modules: str) -> list[str]:
        """Return those of ``modules`` that can be imported in this environment."""
        code = "import sys; from importlib.util import find_spec; print(*filter(find_spec, sys.argv[1:]))"
        return run([self.python, "-c", code, *modules], self.folder).stdout.split()


def copy_checkout(folder: Path, names: list[str]) -> Path:
    """Copy files and folders of the checkout into ``folder``, without compiled and built files."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        if name == "build" or name.endswith(".egg-info"):
            continue
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
        else:
            shutil.copyfile(ROOT / name, folder / name)
    return folder


CONSTRAINED = {"PIP_CONSTRAINT": str(CONSTRAINTS)}
"""Environment variables that make pip constrain setuptools, too.

To build a wheel, pip installs setuptools in a separate environment.
"""


def build(source: Path, tools: Path, output: Path) -> tuple[Path, Path]:
    """Build a source distribution of ``source``, and a wheel from it; return the wheel and the source distribution."""
    venv = Venv(tools)
    venv.install("build")
    run([venv.python, "-m", "build", "--outdir", output, source], tools, changes=CONSTRAINED)
    (wheel,), (sdist,) = output.glob("*.whl"), output.glob("*.tar.gz")
    return wheel, sdist


def version() -> str:
    """Return the version in the checkout."""
    found = re.search(r'^__version__ = "(.+)"$', (ROOT / "secateur" / "__init__.py").read_text(), re.MULTILINE)
    if found is None:
        raise Failure("secateur/__init__.py names no version")
    return found[1]
