"""The command-line options that the benchmarks share, and the settings that all results of a file share."""

import argparse
from pathlib import Path
from typing import Any

from benchmarks.model import MODEL
from secateur.catalog.methods import STATIC_METHODS
from secateur.engine.export import versions


def parser(name: str, description: str | None, dtype: str) -> argparse.ArgumentParser:
    """Return the parser of ``python -m benchmarks.NAME``; ``dtype`` is the default of ``--dtype``."""
    made = argparse.ArgumentParser(prog=f"python -m benchmarks.{name}", description=description)
    made.add_argument("--calibration", default="wikitext2", help="a text file or data set")
    made.add_argument("--methods", nargs="+", choices=STATIC_METHODS, default=list(STATIC_METHODS), metavar="METHOD")
    made.add_argument("--samples", type=int, default=24, help="calibration windows")
    made.add_argument("--sequence-length", type=int, default=256)
    made.add_argument("--dtype", default=dtype)
    made.add_argument("--output", type=Path, default=Path("docs/benchmarks"))
    return made


def settings(arguments: argparse.Namespace, device: str) -> dict[str, Any]:
    """Return the settings of a results file. A text file is listed by its name, without its folder."""
    return {
        "model": MODEL,
        "dtype": arguments.dtype,
        "device": device,
        "calibration": Path(arguments.calibration).name,
        "versions": versions(),
    }


def versions_line(settings: dict[str, Any]) -> str:
    """Return the last line of a document: the versions of the packages."""
    return f"Versions: {', '.join(f'{name} {version}' for name, version in settings['versions'].items())}."
