"""Names of the Hub repositories to which a job publishes."""

import re
from collections.abc import Mapping
from typing import Any

from secateur.catalog.request import JobRequest
from secateur.catalog.spec import Goal, PruningSpec

COUNTS = ("", "k", "m", "b", "t")
BYTES = ("b", "kb", "mb", "gb", "tb")
LONGEST = 96
"""Largest number of characters of a repository's name on the Hub, with its namespace."""
LONGEST_MODEL = 60
LONGEST_PERCENT = len("-33_3333")


def repo_ids(repo_id: str, spec: PruningSpec) -> list[str]:
    """Return one repository name for each ratio, in the order of the ratios.

    If the request has a list of ratios, even of one, each name ends with the percentage that is removed:
    ``org/name-12_5``.
    """
    return [f"{repo_id}-{_percent(ratio)}" if spec.several else repo_id for ratio in spec.requested_ratios]


def published_repo_ids(request: Mapping[str, Any]) -> list[str]:
    """Return the names of all repositories that the job of a stored ``request`` publishes to; there may be none."""
    wanted = request.get("publish")
    return [] if wanted is None else repo_ids(wanted["repo_id"], PruningSpec.of_request(dict(request)))


def default_repo_id(request: JobRequest, namespace: str) -> str:
    """Return ``<namespace>/<model>-<method>`` in a form that a Hub accepts; a long name of a model is cut.

    A request with a single ratio adds that ratio in percent (``-20``); a request with a goal adds the goal (``-110m``,
    ``-500mb``). The name of a request that removes tokens alone ends with ``-vocabulary`` in place of the method.
    """
    model = re.sub(r"[^A-Za-z0-9]+", "-", request.model_id.removeprefix("local:").split("/")[-1]).strip("-")
    ending = f"-{request.method}"
    if request.vocabulary_alone:
        ending = "-vocabulary"
    elif request.goal is not None:
        ending += f"-{_size(request.goal)}"
    elif not request.several:
        ending += f"-{_percent(request.requested_ratios[0])}"
    room = LONGEST - len(f"{namespace}/{ending}") - (LONGEST_PERCENT if request.several else 0)
    return f"{namespace}/{model[: min(room, LONGEST_MODEL)].rstrip('-')}{ending}"


def _percent(ratio: float | None) -> str:
    assert ratio is not None  # a goal is named by its size instead
    return f"{float(f'{ratio:g}') * 100:g}".replace(".", "_")  # six digits distinguish the ratios


def _size(goal: Goal) -> str:
    """Format the goal's size with three significant digits and a unit; the units are powers of one thousand."""
    size, units = (goal.parameters, COUNTS) if goal.parameters is not None else (goal.bytes or 0.0, BYTES)
    rounded = f"{size:.2e}"
    power = min(max(int(rounded.partition("e")[2]) // 3, 0), len(units) - 1)
    return f"{float(rounded) / 1000**power:g}{units[power]}".replace(".", "_")
