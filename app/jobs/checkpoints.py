"""The checkpoints that a job keeps, and the request of a job that publishes one of them."""

import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy.orm import Session

from app.http.problem import Problem
from app.jobs import repository, texts, transitions
from app.jobs.models import Job, JobStep
from app.storage import repository as storage
from secateur.catalog.request import JobRequest, StepPublication
from secateur.catalog.spec import MAX_RATIO
from secateur.contract.errors import ErrorCode
from secateur.contract.states import TERMINAL


@dataclass(frozen=True)
class Origin:
    """The step that a job publishes: the job that completed it, and its steps of the same ratio up to that step."""

    job_id: uuid.UUID
    numbers: Sequence[int]

    @property
    def link(self) -> dict[str, Any]:
        """The origin as the request of the new job shows it."""
        return {"job": str(self.job_id), "step": self.numbers[-1]}


def bytes_of(session: Session, owner_id: uuid.UUID) -> int:
    """Return the number of bytes of everything that is stored for an API key: artifacts and kept checkpoints."""
    return storage.bytes_of(session, owner_id) + repository.kept_bytes(session, owner_id)


def keep(session: Session, job: Job, number: int, quota: int | None) -> set[int]:
    """Return the steps before step ``number`` whose checkpoints stay.

    A warning says which step is not kept because the files of the API key would have more than ``quota`` bytes.
    """
    steps = {step.number: step for step in repository.steps(session, job.id)}
    kept = {n for n in repository.kept_steps(session, job.id) if n < number and _has_model(steps[n].data)}
    if number - 1 in kept and quota is not None and bytes_of(session, job.owner_id) > quota:
        kept.remove(number - 1)
        message = (
            f"Step {number - 1} is not kept: the files of this API key have {quota:,} bytes, as many as they may have."
        )
        transitions.record_event(session, job, "warning", {"message": message})
    return kept


def _has_model(data: Mapping[str, Any]) -> bool:
    """Return whether a step left a pruned model: the baseline and the parts of a training did not."""
    return bool((data.get("ratio") or {}).get("reached"))


def derive(session: Session, job: Job, number: int, asked: StepPublication) -> tuple[JobRequest, Origin]:
    """Return the request of a job that publishes step ``number`` of ``job``, and the origin of that job.

    The request is that of ``job``, with the ratio that the step reached and the rounds until then.

    Raises:
        Problem: 409 if ``job`` has not ended, or has no checkpoint of a model for the step.
    """
    if job.state not in TERMINAL:
        detail = f"A job that is {job.state} has not ended; its steps can be published afterwards."
        raise Problem(409, ErrorCode.WRONG_STATE, detail, state=job.state)
    steps = repository.steps(session, job.id)
    kept = repository.kept_steps(session, job.id)
    models = {step.number: step for step in steps if step.number in kept and _has_model(step.data)}
    if number not in models:
        raise not_kept(job.id, number, list(models))
    data = models[number].data
    before = [step for step in steps if step.number <= number and _target(step) in (None, data["target_ratio"])]
    whole = texts.whole_request(job)
    trained = data["kind"] == "training"
    reached, shares = data["ratio"]["reached"], whole.get("shares") or {}
    most = min(reached / (sum(shares.values()) or 1), 1.0)  # shares may add up to no more than the ratio
    changes = {
        "target_ratio": min(reached, MAX_RATIO) or None,  # nothing but tokens was removed
        "goal": None,
        "shares": {name: share * most for name, share in shares.items()},
        "rounds": sum(step.data["kind"] == "round" for step in before),
        "recovery": {**whole["recovery"], "training": whole["recovery"]["training"] if trained else None},
        "keep_steps": False,
        "publish": asked.publish,
        "hub_token": asked.hub_token,
    }
    request = JobRequest.model_validate(
        {name: value for name, value in {**whole, **changes}.items() if name in JobRequest.model_fields}
    )
    return request, Origin(job.id, [step.number for step in before])


def _target(step: JobStep) -> Any:
    return step.data.get("target_ratio")


def not_kept(job_id: uuid.UUID, number: int, kept: Sequence[int]) -> Problem:
    """Return the 409 problem of a step that has no checkpoint of a model; it names the steps that have one."""
    names = ", ".join(map(str, kept)) or "none; a job with 'keep_steps' keeps them"
    return Problem(
        409, ErrorCode.STEP_NOT_KEPT, f"Step {number} of job {job_id} has no checkpoint; steps that have one: {names}."
    )
