"""The record of attempts: who used which worker for how long, and how each attempt ended."""

from enum import StrEnum
from typing import Any

from sqlalchemy import func, update
from sqlalchemy.orm import Session

from app.jobs.models import Attempt, Job
from secateur.contract.states import State

SECONDS = func.extract("epoch", func.coalesce(Attempt.ended_at, func.now()) - Attempt.started_at)
"""The worker time of an attempt, in seconds; of an attempt that goes on, until now."""


class Outcome(StrEnum):
    """How an attempt ended. An attempt that failed may be made again, so its job need not have failed."""

    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELLED = "cancelled"
    PAUSED = "paused"
    RELEASED = "released"


def begin(session: Session, job: Job) -> None:
    """Record that the worker ``job.worker`` begins the attempt ``job.attempt``; the caller commits."""
    session.add(Attempt(job_id=job.id, attempt=job.attempt, owner_id=job.owner_id, worker=job.worker))


def close(session: Session, job: Job, after: State, error: dict[str, Any] | None) -> None:
    """Record that the attempt ended, when the job goes to the state ``after``; the caller commits.

    ``error`` {code, …} is what the attempt failed with. An attempt ends with its lease at the latest.
    """
    if error is not None and after is not State.CANCELLED:
        outcome = Outcome.FAILED
    else:
        outcome = Outcome.RELEASED if after is State.QUEUED else Outcome(after)
    session.execute(
        update(Attempt)
        .where(Attempt.job_id == job.id, Attempt.attempt == job.attempt)
        .values(
            ended_at=func.least(func.now(), job.lease_expires_at),
            outcome=outcome,
            error_code=error and error["code"],
        )
    )
