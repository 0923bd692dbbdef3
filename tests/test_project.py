"""The project's own files agree: workflows and hooks call targets of the Makefile, the changelog names the package's version."""

import re
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

import pytest
import yaml
from packaging.specifiers import SpecifierSet

import secateur
import workers
from scripts import release

ROOT = Path(__file__).parents[1]
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
COMMAND = re.compile(r"\.ci/run|make (?P<target>[a-z-]+)( [A-Z]+=\S+( }})?)*")
CHANGELOG = "# Changelog\n\n## 1.2.0, 2026-01-31\n\n## 1.1.0, 2025-12-01\n"


def targets() -> set[str]:
    """The targets of the Makefile."""
    return set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))


@pytest.mark.parametrize("workflow", WORKFLOWS, ids=lambda path: path.stem)
def test_a_workflow_calls_what_a_developer_calls(workflow: Path) -> None:
    jobs: dict[str, Any] = yaml.safe_load(workflow.read_text())["jobs"]
    for command in (step["run"] for job in jobs.values() for step in job["steps"] if "run" in step):
        called = COMMAND.fullmatch(command.replace("${{ ", "${{").replace(" }}", "}}"))
        assert called, f"{workflow.name}: '{command}' is more than a call"
        assert called["target"] is None or called["target"] in targets(), f"{workflow.name}: {command}"


def test_hooks_call_targets() -> None:
    (local,) = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    assert local["repo"] == "local", "a hook of another repository would be downloaded"
    for hook in local["hooks"]:
        assert hook["entry"].removeprefix("make ") in targets(), hook["entry"]


def test_what_is_pinned_installs_on_the_oldest_python() -> None:
    """README asks for CPython 3.11; Debian 12 has 3.11.2, and a pinned package may ask for a later patch."""
    refusing = [
        f"{each.name} {each.version}: Python {each.metadata['Requires-Python']}"
        for each in distributions()
        if "3.11.0" not in SpecifierSet(str(each.metadata.json.get("requires_python", "")))
    ]
    assert not refusing


def test_the_changelog_names_the_version() -> None:
    newest, date = release.newest_entry((ROOT / "CHANGELOG.md").read_text())
    assert newest == secateur.__version__ and f"secateur {newest}" == workers.SERVICE_OF
    assert date == release.UNRELEASED or re.fullmatch(r"\d{4}-\d\d-\d\d", date)


@pytest.mark.parametrize(
    ("tag", "package", "changelog", "reason"),
    [
        ("v1.2.0", "1.2.0", CHANGELOG, None),
        ("v1.3.0", "1.2.0", CHANGELOG, "The tag is v1.3.0, and the package's version is 1.2.0."),
        ("v1.3.0", "1.3.0", CHANGELOG, "The newest entry of CHANGELOG.md is 1.2.0"),
        ("v1.2.0", "1.2.0", CHANGELOG.replace("2026-01-31", "unreleased"), "has no date yet"),
    ],
)
def test_a_release_needs_one_version(tag: str, package: str, changelog: str, reason: str | None) -> None:
    found = release.obstacle(tag, package, changelog)
    assert found is None if reason is None else found is not None and reason in found
