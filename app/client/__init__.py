"""The service from Python: ``Client`` and ``AsyncClient`` do the same, one of them waits for answers with ``await``.

from app.client import Client

with Client("http://127.0.0.1:8000", "sk-secateur-…") as client:
    job = client.jobs.create(model_id="org/model", target_ratio=0.2, method="secateur")
    print(job.wait(on_progress=print).report())
"""

from app.client._async.client import AsyncClient, AsyncJob
from app.client._sync.client import Client, Job
from app.client.errors import (
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
from app.client.report import Report, compare

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
