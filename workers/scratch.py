"""The folders of attempts on a worker's own disk. An attempt deletes its folder when it ends, unless it is killed."""

import shutil
import uuid
from pathlib import Path

from sqlalchemy.orm import Session

from app.config import Settings
from app.jobs import leases


def folder_of(settings: Settings, job_id: uuid.UUID, attempt: int) -> Path:
    """Return the folder of an attempt: ``work/JOB.ATTEMPT`` in the data folder."""
    return settings.work_dir.resolve() / f"{job_id}.{attempt}"


def delete_abandoned(session: Session, settings: Settings) -> None:
    """Delete the folders of attempts that own their jobs no longer.

    Workers that share a disk may do this at the same time.
    """
    folders = list(settings.work_dir.glob("*.*"))  # listed before the owners: a later folder may be a new attempt's
    owned = {f"{job_id}.{attempt}" for job_id, attempt in leases.owners(session)}
    for folder in folders:
        if folder.name not in owned:
            shutil.rmtree(folder, ignore_errors=True)
