"""What can go wrong, as exceptions: the service's problem documents (RFC 9457) by status, and jobs that did not succeed."""

import uuid
from typing import Any

import httpx2

from secateur.contract.field_error import FieldError
from secateur.contract.jobs import JobError


class SecateurError(Exception):
    """Of everything that this client raises."""


class Unreachable(SecateurError):
    """No connection, after all attempts."""


class ApiError(SecateurError):
    """The service refused: ``status``, its stable ``code``, ``detail`` for people, and the fields at fault in ``errors``."""

    def __init__(self, status: int, problem: dict[str, Any]) -> None:
        self.status = status
        self.code = str(problem.get("code", "http_error"))
        self.detail = str(problem.get("detail", f"The answer was {status}, which is none of this service's."))
        self.errors = [FieldError.model_validate(error) for error in problem.get("errors", ())]
        self.problem = problem
        super().__init__(f"{self.detail} ({self.code})")


class InvalidRequest(ApiError):
    """400, 413, 422: the request is at fault, see ``errors``."""


class Unauthorized(ApiError):
    """401: no API key that the service knows."""


class Forbidden(ApiError):
    """403: the key lacks a scope."""


class NotFound(ApiError):
    """404, 410: it is not there, or it is another key's."""


class WrongState(ApiError):
    """409: not in the state that the job is in."""


class RateLimited(ApiError):
    """429, after all attempts."""


class Unavailable(ApiError):
    """5xx, after all attempts."""


BY_STATUS: dict[int, type[ApiError]] = {
    400: InvalidRequest,
    401: Unauthorized,
    403: Forbidden,
    404: NotFound,
    409: WrongState,
    410: NotFound,
    413: InvalidRequest,
    422: InvalidRequest,
    429: RateLimited,
}


class JobFailed(SecateurError):
    """A job that was waited for has failed, with ``error``."""

    def __init__(self, job_id: uuid.UUID, error: JobError | None) -> None:
        self.job_id, self.error = job_id, error
        super().__init__(
            f"Job {job_id} has failed: {error.message} ({error.code})" if error else f"Job {job_id} has failed."
        )


class JobCancelled(SecateurError):
    """A job that was waited for was cancelled."""


class WaitTimeout(SecateurError):
    """A job has not ended in the time it was given; it goes on."""


def error_of(response: httpx2.Response) -> ApiError:
    """The exception for a response of 400 and above, whose body was read."""
    try:
        problem = response.json()
    except ValueError:
        problem = {}
    kind = BY_STATUS.get(response.status_code, Unavailable if response.status_code >= 500 else ApiError)
    return kind(response.status_code, problem if isinstance(problem, dict) else {})
