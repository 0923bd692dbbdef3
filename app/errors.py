"""Exception handlers of the application: each exception becomes a problem document."""

import logging
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel
from sqlalchemy.exc import InterfaceError, OperationalError, SQLAlchemyError
from sqlalchemy.exc import TimeoutError as PoolTimeout
from starlette.exceptions import HTTPException

from app.auth.vault import VaultError
from app.config import get_settings
from app.http.problem import Problem, respond
from app.jobs.transitions import TransitionRefused
from app.sanitise import Sanitiser
from secateur.contract.errors import ErrorCode, PruningError
from secateur.contract.field_error import FieldError

log = logging.getLogger(__name__)

CODES = {
    400: ErrorCode.MALFORMED_REQUEST,
    404: ErrorCode.NOT_FOUND,
    405: ErrorCode.METHOD_NOT_ALLOWED,
    413: ErrorCode.BODY_TOO_LARGE,
}
BOUNDS = {
    "gt": "more than", "ge": "at least", "lt": "less than", "le": "at most", "expected": "one of",
    "min_length": "length at least", "max_length": "length at most", "pattern": "matching",
}  # fmt: skip


def install(app: FastAPI) -> None:
    """Register the exception handlers on the application."""

    @app.exception_handler(Problem)
    def problem(request: Request, error: Problem) -> JSONResponse:
        return respond(request, error)

    @app.exception_handler(RequestValidationError)
    def validation(request: Request, error: RequestValidationError) -> JSONResponse:
        if all(item["loc"][0] == "path" for item in error.errors()):
            return respond(request, Problem(404, ErrorCode.NOT_FOUND, f"There is no {request.url.path}."))
        errors = [_field_error(request, item) for item in error.errors()]
        detail = "; ".join(f"{item.field}: {item.message}" for item in errors[:3])
        return respond(request, Problem(422, ErrorCode.INVALID_REQUEST, detail, errors=errors))

    @app.exception_handler(PruningError)
    def pruning(request: Request, error: PruningError) -> JSONResponse:
        message = Sanitiser(get_settings())(error.message)  # a model or a text may be a file of the service
        errors = [FieldError(field=error.field, message=message)] if error.field else None
        headers = {"Retry-After": "30"} if error.retryable else None
        status = 503 if error.retryable else 422
        return respond(request, Problem(status, error.code, message, errors=errors, headers=headers))

    @app.exception_handler(TransitionRefused)
    def refused(request: Request, error: TransitionRefused) -> JSONResponse:
        return respond(request, Problem(409, ErrorCode.WRONG_STATE, f"{str(error).capitalize()}.", state=error.state))

    @app.exception_handler(HTTPException)
    def http(request: Request, error: HTTPException) -> JSONResponse:
        detail = f"There is no {request.url.path}." if error.status_code == 404 else str(error.detail)
        code = CODES.get(error.status_code, ErrorCode.HTTP_ERROR)
        return respond(request, Problem(error.status_code, code, detail, headers=error.headers))

    @app.exception_handler(VaultError)
    def vault(request: Request, error: VaultError) -> JSONResponse:
        return respond(
            request, Problem(503, ErrorCode.HUB_TOKEN_UNREADABLE, f"The key's Hub token cannot be read: {error}.")
        )

    @app.exception_handler(PoolTimeout)
    def busy(request: Request, error: PoolTimeout) -> JSONResponse:
        detail = "All database connections of this process are in use. Nothing was changed; try again."
        return respond(request, Problem(503, ErrorCode.DATABASE_UNAVAILABLE, detail, headers={"Retry-After": "1"}))

    @app.exception_handler(OperationalError)
    @app.exception_handler(InterfaceError)
    def database(request: Request, error: SQLAlchemyError) -> JSONResponse:
        log.warning("database unavailable: %s", getattr(error, "orig", error))
        detail = "The database does not answer. Nothing was changed that was not confirmed; try again."
        return respond(request, Problem(503, ErrorCode.DATABASE_UNAVAILABLE, detail, headers={"Retry-After": "5"}))


def _field_error(request: Request, item: dict[str, Any]) -> FieldError:
    """Return Pydantic's error as a field error: the field's path as a client writes it and the values allowed there."""
    where, *path = item["loc"]
    field = ".".join(str(part) for part in path) or str(where)
    message = item["msg"].removeprefix("Value error, ")
    if item["type"] == "json_invalid":
        return FieldError(field="body", message=f"not JSON: {item['ctx']['error']} at character {path[0]}")
    if item["type"] == "extra_forbidden":
        return FieldError(field=field, message="unknown field", allowed=_known_fields(request, path))
    limits = [f"{BOUNDS[name]} {value}" for name, value in (item.get("ctx") or {}).items() if name in BOUNDS]
    return FieldError(field=field, message=message, allowed=", ".join(limits) or None)


def _known_fields(request: Request, path: list[str | int]) -> str | None:
    """Return the field names of the model to which the last part of ``path`` was sent, or ``None`` if it is unknown."""
    body = getattr(request.scope.get("route"), "body_field", None)
    model = body.field_info.annotation if body is not None else None
    for part in path[:-1]:
        if not (isinstance(model, type) and issubclass(model, BaseModel)) or part not in model.model_fields:
            return None
        annotation = model.model_fields[str(part)].annotation
        inner = [kind for kind in getattr(annotation, "__args__", ()) if isinstance(kind, type)]
        model = inner[0] if inner else annotation
    return ", ".join(model.model_fields) if isinstance(model, type) and issubclass(model, BaseModel) else None
