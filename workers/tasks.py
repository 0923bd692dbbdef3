"""Define the task that a Celery message starts."""

import signal
import time
from types import FrameType

from app.config import get_settings
from app.db.session import session_factory
from app.jobs import dispatch, leases
from app.jobs.dispatch import TASK
from workers.celery_app import WORKER_NAME, app, shutting_down
from workers.supervisor import supervise


@app.task(name=TASK)
def work() -> None:
    """Claim the next job that this worker may take and make one attempt at it; then wake a worker for the job after it.

    The next worker to look is often this one. A job of the same API key may also have become claimable for another.
    """

    def stop(signum: int, frame: FrameType | None) -> None:
        shutting_down[0] = 1

    # A signal to the whole process group (systemd, a terminal) must not interrupt the release of the job.
    before = signal.signal(signal.SIGTERM, stop)
    try:
        settings, claimed = get_settings(), time.monotonic()
        if shutting_down[0]:
            return
        with session_factory()() as session:
            claim = leases.claim_next(session, WORKER_NAME, settings.lease_ttl, settings.max_running_jobs)
        if claim is not None:
            supervise(claim, claimed, settings, session_factory(), lambda: bool(shutting_down[0]))
            dispatch.wake_worker()
    finally:
        signal.signal(signal.SIGTERM, before)
