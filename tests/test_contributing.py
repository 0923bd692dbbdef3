"""The worked examples of CONTRIBUTING.md are followed: its blocks are put into a copy of the repository, its commands run there."""

import json
import os
import re
import shutil
import subprocess
import sys
import textwrap
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.tiers import slow_but

ROOT = Path(__file__).parents[1]
COPIED = ("secateur", "app", "workers", "migrations", "tests", "demo", "scripts", "pyproject.toml")
BLOCK = re.compile(r"^```(python|sh)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
PLACE = re.compile(r"# (?P<file>[\w/]+\.py)(, (?P<imports>imports)|, in (?P<table>\w+)(, before (?P<next>\w+))?)?\n")


@dataclass(frozen=True)
class Example:
    """A section of CONTRIBUTING.md, the folder of the model that its commands make, and what that model's report names."""

    section: str
    pruned: str
    named: str


EXAMPLES = (
    Example("Adding a method", "build/energy", "energy"),
    Example("Adding a model family", "build/pruned", "persimmon"),
    Example("Adding a layer-wise recovery", "build/rescaled", "rescale"),
    Example("Adding a structure", "build/blocks", "blocks"),
)


@pytest.mark.timeout(1800)  # several processes that import torch: a minute, and many on a busy machine
@pytest.mark.parametrize("example", slow_but(EXAMPLES[:1], EXAMPLES), ids=lambda example: example.section)
def test_an_example_can_be_followed(example: Example, tmp_path: Path) -> None:
    for name in COPIED:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copyfile(source, tmp_path / name)
    commands = []
    for kind, text in blocks(example.section):
        if kind == "sh":
            commands.append(text)
        else:
            follow(text, tmp_path)
    ruff = "python -m ruff {} --quiet --no-cache ."  # `make format`, and the lint of `make check`
    run(f"{ruff.format('check --fix')}\n{ruff.format('format')}\n{ruff.format('check')}", tmp_path)
    run("\n".join(commands), tmp_path)
    report = json.loads((tmp_path / example.pruned / "secateur.json").read_text())["report"]
    assert abs(report["ratio"]["reached"] - 0.3) < 0.05
    assert f'"{example.named}"' in json.dumps(report)


def test_every_example_is_followed() -> None:
    page = (ROOT / "CONTRIBUTING.md").read_text()
    sections = set(re.findall(r"^## (Adding .*)$", page, re.MULTILINE))
    assert sections == {example.section for example in EXAMPLES}
    assert len(BLOCK.findall(page)) == sum(len(blocks(section)) for section in sections), "a block is outside of them"


def blocks(section: str) -> list[tuple[str, str]]:
    """Kind and text of the blocks of a section."""
    page = (ROOT / "CONTRIBUTING.md").read_text()
    _, _, rest = page.partition(f"\n## {section}\n")
    assert rest, section
    return BLOCK.findall(rest.partition("\n## ")[0])


def follow(block: str, root: Path) -> None:
    """Put a Python block where its first line says."""
    place = PLACE.match(block)
    assert place, f"the first line of a block names its file: {block[:80]}"
    path, text = root / place["file"], block[place.end() :]
    if place["table"]:
        path.write_text(with_entry(path.read_text(), place["table"], text, place["next"]))
    elif place["imports"]:
        before, line, after = re.split(r"^((?:from|import) )", path.read_text(), maxsplit=1, flags=re.MULTILINE)
        path.write_text(f"{before}{text}{line}{after}")
    else:
        assert not path.exists(), f"{place['file']} already exists: choose another example"
        path.write_text(text)


def with_entry(source: str, table: str, entry: str, before: str | None) -> str:
    """``source`` with ``entry`` in ``table``, whose last line is a bracket in the first column.

    The entry goes before the one that contains the word ``before``, or to the end.
    """
    opening = re.search(rf"^{table}\b.*[(\[{{]\n", source, re.MULTILINE)
    assert opening, f"there is no table {table}"
    closing = re.compile(r"^[)\]}]", re.MULTILINE).search(source, opening.end())
    assert closing, f"the table {table} has no end"
    indented, place = textwrap.indent(f"{entry.strip()},\n", "    "), closing.start()
    if before is not None:
        entries = [
            opening.end() + each.start() for each in re.finditer(r"^    \w", source[opening.end() : place], re.M)
        ]
        word = re.compile(rf"\b{before}\b").search(source, opening.end(), place)
        assert word, f"the table {table} has no entry {before}"
        place = max(each for each in entries if each <= word.start())
    return source[:place] + indented + source[place:]


def run(commands: str, root: Path) -> None:
    """Run commands as a contributor would, at the top of the copy, in this environment."""
    plain = {name: value for name, value in os.environ.items() if not name.startswith(("SECATEUR_", "PYTEST_"))}
    environment = plain | {
        "PYTHONPATH": str(root),
        "PATH": f"{Path(sys.executable).parent}:{plain['PATH']}",
        "OMP_NUM_THREADS": "1",
    }
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", commands], cwd=root, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
