"""Exception handlers of the application: each exception becomes a problem document."""

import logging

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from fastapi.routing import iter_route_contexts
from sqlalchemy.exc import InterfaceError, OperationalError, SQLAlchemyError
from sqlalchemy.exc import TimeoutError as PoolTimeout
from starlette.exceptions import HTTPException
from starlette.routing import compile_path

from app.auth.vault import VaultError
from app.config import get_settings
from app.http.fields import problem_of
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


def install(app: FastAPI) -> None:
    """Register the exception handlers on the application."""

    @app.exception_handler(Problem)
    def problem(request: Request, error: Problem) -> JSONResponse:
        return respond(request, error)

    @app.exception_handler(RequestValidationError)
    def validation(request: Request, error: RequestValidationError) -> JSONResponse:
        if all(item["loc"][0] == "path" for item in error.errors()):
            return respond(request, Problem(404, ErrorCode.NOT_FOUND, f"There is no {request.scope['path']}."))
        return respond(request, problem_of(error.errors(), None))

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
        detail, headers = str(error.detail), error.headers
        if error.status_code == 404:
            detail = f"There is no {request.scope['path']}."
        if error.status_code == 405:
            allowed = ", ".join(_methods(request))
            detail, headers = f"The path takes {allowed}.", {"Allow": allowed}
        code = CODES.get(error.status_code, ErrorCode.HTTP_ERROR)
        return respond(request, Problem(error.status_code, code, detail, headers=headers))

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


def _methods(request: Request) -> list[str]:
    """Return the methods of all routes of the request's path; Starlette names those of the first route alone."""
    found: set[str] = set()
    for route in iter_route_contexts(request.app.routes):
        if route.path is not None and compile_path(route.path)[0].match(request.scope["path"]):
            found |= route.methods or set()
    return sorted(found)
