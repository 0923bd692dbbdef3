"""Build the source distribution and the wheel of a release in build/dist: ``make dist``.

With ``TAG=v1.2.3``, the script first checks that the package and CHANGELOG.md name the version of the tag. The script
needs the standard library alone.
"""

import os
import re
import shutil
import sys

from scripts import fresh
from scripts.fresh import ROOT

OUTPUT = ROOT / "build" / "dist"
TOOLS = ROOT / "build" / "tools"
UNRELEASED = "unreleased"


def newest_entry(changelog: str) -> tuple[str, str]:
    """Return version and date of the newest entry of CHANGELOG.md.

    The date is ``unreleased`` until a release is made.
    """
    found = re.search(r"^## (\S+), (\S+)$", changelog, re.MULTILINE)
    assert found, "CHANGELOG.md has no entry like '## 1.2.3, 2026-01-31'"
    return found[1], found[2]


def obstacle(tag: str, package: str, changelog: str) -> str | None:
    """Return why ``tag`` cannot be released, or ``None`` if it can be released.

    ``package`` is the package's version, and ``changelog`` is the text of CHANGELOG.md.
    """
    newest, date = newest_entry(changelog)
    if tag != f"v{package}":
        return f"The tag is {tag}, and the package's version is {package}."
    if newest != package:
        return f"The newest entry of CHANGELOG.md is {newest}, and the package's version is {package}."
    if date == UNRELEASED:
        return f"The entry of {package} in CHANGELOG.md has no date yet."
    return None


def build() -> None:
    """Build the source distribution, and the wheel from it."""
    for folder in (OUTPUT, TOOLS):
        shutil.rmtree(folder, ignore_errors=True)
    OUTPUT.mkdir(parents=True)
    fresh.build(ROOT, TOOLS, OUTPUT)


def main() -> None:
    """Check the tag that the environment names, if it names one, and build."""
    tag = os.environ.get("TAG")
    reason = obstacle(tag, fresh.version(), (ROOT / "CHANGELOG.md").read_text()) if tag else None
    if reason is not None:
        sys.exit(reason)
    build()


if __name__ == "__main__":
    main()
