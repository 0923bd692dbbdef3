"""Plays the worker: moves jobs as a worker would, through leases."""

import hashlib
import uuid
from typing import Any

from sqlalchemy.orm import Session

from app.config import Settings
from app.jobs import leases
from app.storage.service import artifacts_folder
from app.storage.store import open_store

REPORT = {"ratio": {"target": 0.2, "reached": 0.2}, "perplexity": {"before": 10.0, "after": 11.0}}
CONTENTS = {"config.json": b'{"a": 1}', "model.safetensors": bytes(range(256)) * 40}
LIMITS = leases.Patience(max_failures=3, max_losses=10, publish=3600, backoff=0, worker_silence=600)
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
    data = {
        "kind": "round",
        "target_ratio": 0.2,
        "ratio": {"target": 0.1 * number, "reached": 0.1 * number},
        "perplexity": 10.0 + number,
        "seconds": 2.0,
    }
    leases.record_step(session, uuid.UUID(job_id), attempt, number, data, {"step": number})


def succeed(
    session: Session, settings: Settings, job_id: str, attempt: int, contents: dict[str, bytes] | None = None
) -> None:
    contents = CONTENTS if contents is None else contents
    (settings.data_dir / "storage" / "jobs" / job_id).mkdir(parents=True, exist_ok=True)
    (settings.data_dir / "storage" / "jobs" / job_id / "secret.json").write_text("no artifact")
    files = store_files(settings, job_id, attempt, contents)
    leases.record_export(session, uuid.UUID(job_id), attempt, REPORT, files)
    leases.succeed(session, uuid.UUID(job_id), attempt, RESULT, {"stage": "done", "steps": 2, "share": 1.0})


def store_files(settings: Settings, job_id: str, attempt: int, contents: dict[str, bytes]) -> list[dict[str, Any]]:
    """Store files as a worker does; returns what it records of them."""
    files = []
    for name, content in contents.items():
        key = artifacts_folder(job_id, attempt) + name
        open_store(settings).create(key, content)
        files.append({"name": name, "key": key, "size": len(content), "sha256": hashlib.sha256(content).hexdigest()})
    return files


def fail(session: Session, job_id: str, attempt: int) -> None:
    error = {"code": "nan_weights", "message": "The weights have NaN.", "retryable": False, "field": "model_id"}
    leases.fail(session, uuid.UUID(job_id), attempt, error, LIMITS)
