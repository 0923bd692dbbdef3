"""Which cases of a long table the default suite runs, and which `make test-slow` adds."""

from collections.abc import Iterable
from typing import Any

import pytest


def slow_but(quick: Iterable[Any], cases: Iterable[Any]) -> list[Any]:
    """Return all ``cases`` as parameters, of which those in ``quick`` run by default and the others with the marker ``slow``.

    Each of ``quick`` must be one of ``cases``.
    """
    wanted, all_cases = list(quick), list(cases)
    assert all(case in all_cases for case in wanted), "a quick case is not in the table"
    return [case if case in wanted else _slow(case) for case in all_cases]


def _slow(case: Any) -> Any:
    values = case if isinstance(case, tuple) else (case,)
    return pytest.param(*values, marks=pytest.mark.slow)
