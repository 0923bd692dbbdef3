"""Errors of fields: what Pydantic found wrong with a request, as a problem document."""

from collections.abc import Sequence
from typing import Any

from pydantic import BaseModel

from app.http.problem import Problem, excerpt
from secateur.contract.errors import ErrorCode
from secateur.contract.field_error import FieldError

MOST_ERRORS = 20
BOUNDS = {
    "gt": "more than", "ge": "at least", "lt": "less than", "le": "at most", "expected": "one of",
    "min_length": "length at least", "max_length": "length at most", "pattern": "matching",
}  # fmt: skip


def problem_of(items: Sequence[Any], model: type[BaseModel] | None) -> Problem:
    """Return a 422 problem for Pydantic's errors, with the first :data:`MOST_ERRORS` of them.

    ``model`` is the type of the body, from which the allowed names of fields are told, once for each object.
    """
    named: set[tuple[str | int, ...]] = set()
    errors = [_field_error(item, model, named) for item in items[:MOST_ERRORS]]
    detail = "; ".join(f"{item.field}: {item.message}" for item in errors[:3])
    if len(items) > 3:
        detail += f"; and {len(items) - 3} more"
    return Problem(422, ErrorCode.INVALID_REQUEST, detail, errors=errors)


def _field_error(item: dict[str, Any], model: type[BaseModel] | None, named: set[tuple[str | int, ...]]) -> FieldError:
    """Return Pydantic's error as a field error: the field's path as a client writes it and the values allowed there."""
    path = [part for index, part in enumerate(item["loc"]) if index or part not in ("body", "path", "query", "header")]
    field = excerpt(".".join(str(part) for part in path) or "body")
    message = item["msg"].removeprefix("Value error, ")
    if item["type"] == "extra_forbidden":
        parent = tuple(path[:-1])
        allowed = None if parent in named else _known_fields(model, parent)
        named.add(parent)
        return FieldError(field=field, message="unknown field", allowed=allowed)
    limits = [f"{BOUNDS[name]} {value}" for name, value in (item.get("ctx") or {}).items() if name in BOUNDS]
    return FieldError(field=field, message=message, allowed=", ".join(limits) or None)


def _known_fields(model: Any, parent: Sequence[str | int]) -> str | None:
    """Return the names of the fields of the object at the path ``parent``, or ``None`` if it is unknown."""
    for part in parent:
        if not (isinstance(model, type) and issubclass(model, BaseModel)) or part not in model.model_fields:
            return None
        annotation = model.model_fields[str(part)].annotation
        inner = [kind for kind in getattr(annotation, "__args__", ()) if isinstance(kind, type)]
        model = inner[0] if inner else annotation
    return ", ".join(model.model_fields) if isinstance(model, type) and issubclass(model, BaseModel) else None
