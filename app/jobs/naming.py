"""Names of the Hub repositories to which a job publishes."""

import re

from secateur.catalog.request import JobRequest
from secateur.catalog.spec import Goal, PruningSpec

COUNTS = ("", "k", "m", "b", "t")
BYTES = ("b", "kb", "mb", "gb", "tb")


def repo_ids(repo_id: str, spec: PruningSpec) -> list[str]:
    """Return one repository name for each ratio, in the order of the ratios.

    If the request has a list of ratios, even of one, each name ends with the percentage that is removed:
    ``org/name-12_5``.
    """
    return [f"{repo_id}-{_percent(ratio)}" if spec.several else repo_id for ratio in spec.requested_ratios]


def default_repo_id(request: JobRequest) -> str:
    """Return ``secateur/<model>-<method>`` in a form that a Hub accepts.

    A request with a single ratio adds that ratio in percent (``-20``); a request with a goal adds the goal (``-110m``,
    ``-500mb``).
    """
    model = re.sub(r"[^A-Za-z0-9]+", "-", request.model_id.removeprefix("local:").split("/")[-1]).strip("-")
    name = f"secateur/{model[:60].rstrip('-')}-{request.method}"
    if request.goal is not None:
        return f"{name}-{_size(request.goal)}"
    return name if request.several else f"{name}-{_percent(request.requested_ratios[0])}"


def _percent(ratio: float | None) -> str:
    assert ratio is not None  # a goal is named by its size instead
    return f"{float(f'{ratio:g}') * 100:g}".replace(".", "_")  # six digits distinguish the ratios


def _size(goal: Goal) -> str:
    """Format the goal's size with three significant digits and a unit; the units are powers of one thousand."""
    size, units = (goal.parameters, COUNTS) if goal.parameters is not None else (goal.bytes or 0.0, BYTES)
    rounded = f"{size:.2e}"
    power = min(max(int(rounded.partition("e")[2]) // 3, 0), len(units) - 1)
    return f"{float(rounded) / 1000**power:g}{units[power]}".replace(".", "_")
