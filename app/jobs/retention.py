"""The deletion of the files of jobs that ended long ago; the jobs themselves stay."""

from sqlalchemy.orm import Session

from app.jobs import repository
from app.storage import repository as storage
from app.storage.service import job_folder

JOBS_AT_ONCE = 100


def delete_expired(session: Session) -> None:
    """Request the deletion of the files that are kept no longer; commits."""
    jobs = repository.with_expired_files(session, JOBS_AT_ONCE)
    ids = [job.id for job in jobs]
    storage.request_deletion(session, [job_folder(job_id) for job_id in ids])
    storage.forget(session, ids)
    repository.forget_states(session, ids)
    for job in jobs:
        job.expired, job.exported_at, job.version = True, None, job.version + 1
    session.commit()
