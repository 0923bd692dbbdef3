"""Error codes: the page about them is complete, and the code uses no others."""

import re

from scripts.errors_page import PAGE, page
from secateur.contract.errors import ErrorCode
from tests.workers.conftest import ROOT


def test_the_page_has_every_code() -> None:
    assert PAGE.read_text() == page(), "run 'make errors'"
    rows = re.findall(r"^\| `([a-z_]+)` \| (.+) \| (yes|no) \| (.+) \|$", PAGE.read_text(), re.MULTILINE)
    assert [row[0] for row in rows] == [code.value for code in ErrorCode]
    for _, meaning, _, advice in rows:
        assert meaning.endswith(".") and advice.endswith(".")


def test_every_code_is_raised_somewhere() -> None:
    files = [file for folder in ("secateur", "app", "workers") for file in (ROOT / folder).rglob("*.py")]
    used = {name for file in files for name in re.findall(r"ErrorCode\.([A-Z_]+)", file.read_text())}
    assert used == {code.name for code in ErrorCode}


def test_retryable_belongs_to_the_code() -> None:
    assert ErrorCode.HUB_UNAVAILABLE.retryable and not ErrorCode.MODEL_GATED.retryable
    assert ErrorCode.__members__["DISK_FULL"] is ErrorCode.DISK_FULL and str(ErrorCode.DISK_FULL) == "disk_full"
