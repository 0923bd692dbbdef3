"""Run the scheduler, a plain loop beside the workers.

Any number of schedulers may run; row locks keep them from disturbing each other.
"""

import logging
import os
import signal
import socket
import threading
from collections.abc import Callable

import redis
from sqlalchemy.orm import Session, sessionmaker

from app.config import Settings
from app.fleet import repository as fleet
from app.fleet import service as workers
from app.http import idempotency
from app.jobs import dispatch, fair_queue, leases, retention
from app.jobs.leases import Patience
from app.storage.service import delete_requested
from app.storage.store import open_store
from app.tracking import service as tracking
from app.webhooks import service as webhooks

log = logging.getLogger(__name__)

QUEUE = "celery"
HOUSEKEEPING_SECONDS = 60.0
LONGEST_BACKOFF = 30.0
FORGET_WORKERS_AFTER = 86_400.0


def run(settings: Settings, sessions: sessionmaker[Session]) -> None:
    """Do all duties until SIGTERM or SIGINT, each in its own thread, so that a slow webhook delays no job."""
    name = f"{socket.gethostname()}:{os.getpid()}"

    def beat(session: Session, settings: Settings) -> None:
        """Write the heartbeat that the health check of this scheduler reads."""
        fleet.beat(session, name, "scheduler", {})

    ended = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: ended.set())
    duties = [
        threading.Thread(target=_repeat, args=(duty, interval, settings, sessions, ended))
        for duty, interval in (
            (reap, settings.scheduler_interval),
            (wake_workers, settings.scheduler_interval),
            (deliver_webhooks, settings.scheduler_interval),
            (delete_leftovers, HOUSEKEEPING_SECONDS),
            (beat, settings.heartbeat_interval),
            *([(track_jobs, settings.scheduler_interval)] if settings.mlflow_tracking_uri else []),
        )
    ]
    for duty in duties:
        duty.start()
    for duty in duties:
        duty.join()
    try:
        with sessions() as session:
            fleet.leave(session, name)
    except Exception as error:
        log.warning("could not sign off: %s", error)


def _repeat(
    duty: Callable[[Session, Settings], None],
    interval: float,
    settings: Settings,
    sessions: sessionmaker[Session],
    ended: threading.Event,
) -> None:
    """Do ``duty`` every ``interval`` seconds; when the database or the broker is away, wait and try again."""
    wait = 0.0
    while not ended.wait(wait):
        try:
            with sessions() as session:
                duty(session, settings)
            wait = interval
        except Exception as error:
            wait = min(LONGEST_BACKOFF, max(2 * wait, settings.scheduler_interval))
            log.warning("%s failed, next try in %.1f s: %s", duty.__name__, wait, error)


def reap(session: Session, settings: Settings) -> None:
    """Take jobs from workers that stopped answering."""
    for job_id in leases.reap(session, Patience.of(settings)):
        log.info("job %s: its worker is lost", job_id)


def wake_workers(session: Session, settings: Settings) -> None:
    """Wake the idle workers if one of them may take a queued job.

    This covers all reasons for which a worker did not look for the job yet: its message was lost or was read by a worker
    that cannot hold it, its wait after a failure is over, its API key may run one more job, or the worker is new. All
    idle workers are woken, because any of them may read the first message. Messages that wait already are not added to.
    """
    idle = workers.idle(session, settings)
    distinct = [offer for index, offer in enumerate(idle) if offer not in idle[:index]]
    if not any(fair_queue.first(session, offer, settings.max_running_jobs) for offer in distinct):
        return
    session.rollback()  # returns the connection to the pool before the broker is asked
    with redis.Redis.from_url(settings.broker_url, socket_connect_timeout=1, socket_timeout=5) as broker:
        waiting = int(broker.llen(QUEUE))
    for _ in range(len(idle) - waiting):
        dispatch.wake_worker()


def deliver_webhooks(session: Session, settings: Settings) -> None:
    """Send the webhook deliveries that are due."""
    webhooks.deliver_due(session, settings)


def track_jobs(session: Session, settings: Settings) -> None:
    """Tell MLflow what has happened to jobs."""
    tracking.report_due(session, settings)


def delete_leftovers(session: Session, settings: Settings) -> None:
    """Delete expired records and files, and the files of deleted jobs."""
    idempotency.delete_expired(session, settings.idempotency_ttl)
    fleet.delete_silent(session, FORGET_WORKERS_AFTER)
    retention.delete_expired(session)
    delete_requested(session, open_store(settings))
