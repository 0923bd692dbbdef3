"""Define the task that a Celery message starts."""

import signal
import uuid
from types import FrameType

from app.config import get_settings
from app.db.session import session_factory
from app.jobs.dispatch import TASK
from workers.celery_app import WORKER_NAME, app, shutting_down
from workers.supervisor import supervise


@app.task(name=TASK)
def work_on(job_id: str) -> None:
    """Work on a job if it can be claimed."""

    def stop(signum: int, frame: FrameType | None) -> None:
        shutting_down[0] = 1

    # A signal to the whole process group (systemd, a terminal) must not interrupt the release of the job.
    before = signal.signal(signal.SIGTERM, stop)
    try:
        supervise(uuid.UUID(job_id), get_settings(), session_factory(), WORKER_NAME, lambda: bool(shutting_down[0]))
    finally:
        signal.signal(signal.SIGTERM, before)
