"""The client's exceptions: one for each status of a problem document (RFC 9457), and those of jobs without success."""

import uuid
from typing import Any

import httpx2

from secateur.contract.field_error import FieldError
from secateur.contract.jobs import JobError


class SecateurError(Exception):
    """The base class of the client's exceptions."""


class Unreachable(SecateurError):
    """The service cannot be reached after all attempts."""


class ApiError(SecateurError):
    """The service refused a request.

    ``status`` is the HTTP status, ``code`` is the stable error code, ``detail`` is an explanation for people, and
    ``errors`` lists the fields at fault.
    """

    def __init__(self, status: int, problem: dict[str, Any]) -> None:
        self.status = status
        self.code = str(problem.get("code", "http_error"))
        self.detail = str(problem.get("detail", f"The answer was {status}, which is none of this service's."))
        self.errors = [FieldError.model_validate(error) for error in problem.get("errors", ())]
        self.problem = problem
        super().__init__(f"{self.detail} ({self.code})")


class InvalidRequest(ApiError):
    """The request is at fault (status 400, 413 or 422); ``errors`` lists the fields at fault."""


class Unauthorized(ApiError):
    """The request has no API key that the service knows (status 401)."""


class Forbidden(ApiError):
    """The API key lacks the scope that the operation needs (status 403)."""


class NotFound(ApiError):
    """The resource does not exist, or belongs to another API key (status 404 or 410)."""


class WrongState(ApiError):
    """The job's state does not allow the operation (status 409)."""


class RateLimited(ApiError):
    """The API key has reached a limit, and all attempts of the client failed (status 429)."""


class Unavailable(ApiError):
    """The service failed (status 5xx); after status 503, the client has repeated the request as often as it may."""


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
    """A job that the caller waited for has failed; ``error`` says why."""

    def __init__(self, job_id: uuid.UUID, error: JobError | None) -> None:
        self.job_id, self.error = job_id, error
        super().__init__(
            f"Job {job_id} has failed: {error.message} ({error.code})" if error else f"Job {job_id} has failed."
        )


class JobCancelled(SecateurError):
    """A job that the caller waited for was cancelled."""


class WaitTimeout(SecateurError):
    """A job has not ended within the timeout; the job continues."""


def error_of(response: httpx2.Response) -> ApiError:
    """Return the exception for a response with a status of 400 or above, whose body was read."""
    try:
        problem = response.json()
    except ValueError:
        problem = {}
    kind = BY_STATUS.get(response.status_code, Unavailable if response.status_code >= 500 else ApiError)
    return kind(response.status_code, problem if isinstance(problem, dict) else {})
