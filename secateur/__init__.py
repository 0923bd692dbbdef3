"""Structured pruning of large language models.

``prune`` is the main function of the library; ``docs/library.md`` describes it. The module of a public name, and torch
if the module needs it, is imported when the name is first used.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from secateur.catalog.recipe import Recipe, RecipeInvalid
    from secateur.contract.errors import ErrorCode, PruningError
    from secateur.contract.report import Report
    from secateur.library import Paused, Result, prune

__version__ = "0.2.0"

_HOMES = {
    "ErrorCode": "secateur.contract.errors",
    "Paused": "secateur.library",
    "PruningError": "secateur.contract.errors",
    "Recipe": "secateur.catalog.recipe",
    "RecipeInvalid": "secateur.catalog.recipe",
    "Report": "secateur.contract.report",
    "Result": "secateur.library",
    "prune": "secateur.library",
}
"""The module that defines each public name."""

__all__ = [
    "ErrorCode",
    "Paused",
    "PruningError",
    "Recipe",
    "RecipeInvalid",
    "Report",
    "Result",
    "__version__",
    "prune",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'secateur' has no attribute '{name}'")
    if _HOMES[name] == "secateur.library":
        from secateur.extras import require

        require("engine", "Pruning on this machine")
    return getattr(import_module(_HOMES[name]), name)
