"""Plays the worker: moves jobs as a worker would, through leases."""

import uuid
from typing import Any

from sqlalchemy.orm import Session

from app.config import Settings
from app.jobs import leases
from app.jobs.transitions import Trigger

REPORT = {"ratio": {"target": 0.2, "reached": 0.2}, "perplexity": {"before": 10.0, "after": 11.0}}
RESULT = {"repo_id": "secateur/tiny", "commit_sha": "abc"}


def start(session: Session, job_id: str) -> int:
    """Claim; returns the attempt."""
    claim = leases.claim(session, uuid.UUID(job_id), "player", 600)
    assert claim is not None
    return claim.attempt


def progress(session: Session, job_id: str, attempt: int, share: float) -> None:
    shown: dict[str, Any] = {"stage": "scoring", "step": 1, "steps": 2, "share": share, "estimated_finish_at": None}
    leases.report_progress(session, uuid.UUID(job_id), attempt, shown)


def finish_round(session: Session, job_id: str, attempt: int, number: int) -> None:
    data = {"kind": "round", "ratio": 0.1 * number, "perplexity": 10.0 + number, "seconds": 2.0}
    leases.record_step(session, uuid.UUID(job_id), attempt, number, f"step-{number}", "00", data)


def succeed(session: Session, settings: Settings, job_id: str, attempt: int) -> None:
    folder = settings.job_dir(job_id) / "artifacts"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text('{"a": 1}')
    (folder / "model.safetensors").write_bytes(bytes(range(256)) * 40)
    (folder / "nested").mkdir()
    (settings.job_dir(job_id) / "secret.json").write_text("no artifact")
    leases.move(session, uuid.UUID(job_id), attempt, Trigger.PUBLISH)
    leases.move(session, uuid.UUID(job_id), attempt, Trigger.SUCCEED, result=RESULT, report=REPORT)


def fail(session: Session, job_id: str, attempt: int) -> None:
    error = {"code": "nan_weights", "message": "The weights have NaN.", "retryable": False, "field": "model_id"}
    leases.fail(session, uuid.UUID(job_id), attempt, error, 3, 0)
