"""The names of the repositories that a job publishes to."""

import re

from secateur.catalog.request import JobRequest
from secateur.catalog.spec import Goal, PruningSpec

COUNTS = ("", "k", "m", "b", "t")
BYTES = ("b", "kb", "mb", "gb", "tb")


def repo_ids(repo_id: str, spec: PruningSpec) -> list[str]:
    """One name a target, in their order; where a list was asked for, by the percentage that goes: ``org/name-12_5``."""
    return [f"{repo_id}-{_percent(ratio)}" if spec.several else repo_id for ratio in spec.requested_ratios]


def default_repo_id(request: JobRequest) -> str:
    """``secateur/<model>-<method>`` as a Hub takes it; with ``-20`` (%), ``-110m`` or ``-500mb`` if there is one target."""
    model = re.sub(r"[^A-Za-z0-9]+", "-", request.model_id.removeprefix("local:").split("/")[-1]).strip("-")
    name = f"secateur/{model[:60].rstrip('-')}-{request.method}"
    if request.goal is not None:
        return f"{name}-{_size(request.goal)}"
    return name if request.several else f"{name}-{_percent(request.requested_ratios[0])}"


def _percent(ratio: float | None) -> str:
    assert ratio is not None  # or it would be named by its size
    return f"{float(f'{ratio:g}') * 100:g}".replace(".", "_")  # of the six digits by which ratios differ


def _size(goal: Goal) -> str:
    """Three digits and a unit, a thousand of each in the next."""
    size, units = (goal.parameters, COUNTS) if goal.parameters is not None else (goal.bytes or 0.0, BYTES)
    rounded = f"{size:.2e}"
    power = min(max(int(rounded.partition("e")[2]) // 3, 0), len(units) - 1)
    return f"{float(rounded) / 1000**power:g}{units[power]}".replace(".", "_")
