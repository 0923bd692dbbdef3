"""The client of the service: ``Client`` is synchronous, and ``AsyncClient`` has the same methods with ``await``.

from secateur.client import Client

with Client("http://127.0.0.1:8000", "sk-secateur-…") as client:
    job = client.jobs.create(model_id="org/model", target_ratio=0.2, method="secateur")
    print(job.wait(on_progress=print).report())
"""

from secateur.client._async.client import AsyncClient, AsyncJob
from secateur.client._sync.client import Client, Job
from secateur.client.errors import (
    ApiError,
    Forbidden,
    InvalidRequest,
    JobCancelled,
    JobFailed,
    NotFound,
    RateLimited,
    SecateurError,
    Unauthorized,
    Unavailable,
    Unreachable,
    WaitTimeout,
    WrongState,
)
from secateur.client.report import Report, compare

__all__ = [
    "ApiError",
    "AsyncClient",
    "AsyncJob",
    "Client",
    "Forbidden",
    "InvalidRequest",
    "Job",
    "JobCancelled",
    "JobFailed",
    "NotFound",
    "RateLimited",
    "Report",
    "SecateurError",
    "Unauthorized",
    "Unavailable",
    "Unreachable",
    "WaitTimeout",
    "WrongState",
    "compare",
]
