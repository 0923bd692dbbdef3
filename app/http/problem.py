"""Problem details (RFC 9457): every error of the API is a problem document with a stable ``code``."""

from collections.abc import Mapping
from http import HTTPStatus
from typing import Any

from fastapi import Request
from fastapi.responses import JSONResponse
from pydantic import BaseModel, ConfigDict, Field

from secateur.contract.errors import ErrorCode
from secateur.contract.field_error import FieldError

MEDIA_TYPE = "application/problem+json"
LONGEST = 1000
"""Largest number of characters of a detail, and of a field's message and allowed values."""


class ProblemDetails(BaseModel):
    """A problem document (RFC 9457). `code` is stable and meant for programs; `detail` is meant for people."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {
                    "type": "about:blank",
                    "title": "Unprocessable Entity",
                    "status": 422,
                    "code": "invalid_request",
                    "detail": "target_ratio: Input should be less than or equal to 0.9",
                    "request_id": "0199a0c6-3f5c-7d3e-9a53-0d8f4c1b2a10",
                    "errors": [
                        {
                            "field": "target_ratio",
                            "message": "Input should be less than or equal to 0.9",
                            "allowed": "at most 0.9",
                        }
                    ],
                }
            ]
        }
    )

    type: str = "about:blank"
    title: str = Field(description="The status in words.")
    status: int
    code: str = Field(
        description="A name of `ErrorCode`, see docs/errors.md.", json_schema_extra={"enum": list(ErrorCode)}
    )
    detail: str
    request_id: str | None = None
    state: str | None = Field(None, description="With 409: the job's current state.")
    errors: list[FieldError] | None = Field(None, description="With 422: the fields at fault.")


class Problem(Exception):
    """An error answer to a request, with its status, code and detail."""

    def __init__(
        self,
        status: int,
        code: ErrorCode,
        detail: str,
        *,
        errors: list[FieldError] | None = None,
        state: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(detail)
        self.status = status
        self.code = code
        self.detail = detail
        self.errors = errors
        self.state = state
        self.headers = headers


def excerpt(text: str, longest: int = 100) -> str:
    """Return the beginning of a text that a client sent, in a form that every answer can contain.

    Lone surrogates, which UTF-8 has no form for, are shown as ``?``.
    """
    shown = text if len(text) <= longest else f"{text[:longest]}…"
    return shown.encode(errors="replace").decode()


def invalid(
    field: str, message: str, *, code: ErrorCode = ErrorCode.INVALID_REQUEST, allowed: str | None = None
) -> Problem:
    """Return a 422 problem about one field."""
    field = excerpt(field)
    return Problem(422, code, f"{field}: {message}", errors=[FieldError(field=field, message=message, allowed=allowed)])


def respond(request: Request, problem: Problem) -> JSONResponse:
    """Return the problem as an HTTP response; what it repeats of the request is shortened."""
    details = ProblemDetails(
        title=HTTPStatus(problem.status).phrase,
        status=problem.status,
        code=problem.code,
        detail=excerpt(problem.detail, LONGEST),
        request_id=getattr(request.state, "request_id", None),
        state=problem.state,
        errors=problem.errors and [_shortened(error) for error in problem.errors],
    )
    return JSONResponse(
        details.model_dump(exclude_none=True),
        status_code=problem.status,
        headers=dict(problem.headers or {}),
        media_type=MEDIA_TYPE,
    )


def _shortened(error: FieldError) -> FieldError:
    allowed = None if error.allowed is None else excerpt(error.allowed, LONGEST)
    return FieldError(field=excerpt(error.field), message=excerpt(error.message, LONGEST), allowed=allowed)


def documented(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """Return the ``responses=`` argument of a route that may answer with problems of these statuses."""
    return {
        status: {
            "description": HTTPStatus(status).phrase,
            "content": {MEDIA_TYPE: {"schema": {"$ref": "#/components/schemas/ProblemDetails"}}},
        }
        for status in statuses
    }
