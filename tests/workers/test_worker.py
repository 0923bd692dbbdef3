"""The real Celery worker, broker and scheduler around the supervisor."""

import os
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
import redis
from sqlalchemy.orm import Session

from app.config import Settings
from app.fleet import repository as fleet
from app.jobs import dispatch
from tests.patience import PATIENCE
from tests.workers.conftest import MakeJob, Start, alive, expire, wait_for
from workers import scheduler, scratch
from workers.__main__ import WORKER_FLAGS

StartWorker = Callable[[], subprocess.Popen[bytes]]


@pytest.fixture
def start_worker(start: Start, session: Session) -> StartWorker:
    """Start a worker and wait until it beats."""

    def begin() -> subprocess.Popen[bytes]:
        before = len(fleet.live(session, 3600))
        worker = start("celery", "-A", "tests.workers.celery_standin", "worker", "--loglevel", "INFO", *WORKER_FLAGS)
        wait_for(lambda: len(fleet.live(session, 3600)) > before)
        return worker

    return begin


def children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def test_shutdown_gives_the_job_back_and_the_next_worker_goes_on(
    make_job: MakeJob, start_worker: StartWorker, start: Start, session: Session
) -> None:
    worker = start_worker()
    job = make_job({"hang_in_round": 2})
    dispatch.wake_worker(job.id)
    job.wait_for_round(1)
    pid = job.runner_pid
    worker.terminate()
    assert worker.wait(PATIENCE) == 0
    assert not alive(pid)
    assert (job.row.state, job.row.failures) == ("queued", 0)
    session.rollback()
    assert not fleet.live(session, 3600), "it signed off"
    start_worker()
    start("workers", "scheduler")
    job.wait_for_state("succeeded")
    assert job.worked[-2:] == [(2, 2), (2, 3)]


def test_a_signal_to_the_whole_group_gives_the_job_back_too(make_job: MakeJob, start_worker: StartWorker) -> None:
    worker = start_worker()
    [prefork] = children(worker.pid)
    job = make_job({"hang_in_round": 1})
    dispatch.wake_worker(job.id)
    job.wait_for_round(0)
    for pid in (prefork, worker.pid):
        os.kill(pid, signal.SIGTERM)
    worker.wait(PATIENCE)
    assert (job.row.state, job.row.failures) == ("queued", 0)


def test_kill_9_of_a_worker_leaves_nothing_running_and_loses_nothing(
    make_job: MakeJob, start_worker: StartWorker, start: Start, settings: Settings
) -> None:
    worker = start_worker()
    [prefork] = children(worker.pid)
    job = make_job({"hang_in_round": 2})
    dispatch.wake_worker(job.id)
    job.wait_for_round(1)
    pid = job.runner_pid
    worker.kill()
    wait_for(lambda: not alive(prefork) and not alive(pid))  # their lease is longer than this waits
    expire(job)
    start_worker()
    start("workers", "scheduler")
    job.wait_for_state("succeeded")
    assert (job.row.attempt, job.row.failures) == (2, 0), "a step was completed since"


def test_a_worker_replaces_the_process_that_supervises(
    make_job: MakeJob, start_worker: StartWorker, start: Start
) -> None:
    worker = start_worker()
    [prefork] = children(worker.pid)
    job = make_job({"hang_in_round": 1})
    dispatch.wake_worker(job.id)
    pid = job.runner_pid
    os.kill(prefork, signal.SIGKILL)
    wait_for(lambda: not alive(pid))  # its lease is longer than this waits
    expire(job)
    start("workers", "scheduler")
    job.wait_for_state("succeeded")
    main = psutil.Process(worker.pid)
    before, began = sum(main.cpu_times()[:2]), time.monotonic()
    time.sleep(2)
    assert sum(main.cpu_times()[:2]) - before < 0.2 * (time.monotonic() - began), "it does not spin over what is closed"


def test_a_broker_that_loses_every_message_loses_no_job(
    make_job: MakeJob, start_worker: StartWorker, start: Start, settings: Settings
) -> None:
    jobs = [make_job() for _ in range(3)]
    for job in jobs:
        dispatch.wake_worker(job.id)
        dispatch.wake_worker(job.id)
    with redis.Redis.from_url(settings.broker_url) as broker:
        broker.flushall()
    start_worker()
    start("workers", "scheduler")
    for job in jobs:
        job.wait_for_state("succeeded")
        assert job.row.attempt == 1, "a second ring finds nothing to do"


def test_the_scheduler_does_not_fill_the_broker(make_job: MakeJob, session: Session, settings: Settings) -> None:
    job = make_job()
    with redis.Redis.from_url(settings.broker_url) as broker:
        broker.rpush(scheduler.QUEUE, *["waiting"] * scheduler.MOST_WAITING)
        scheduler.dispatch_due(session, settings)
        assert job.row.dispatched_at is None
        broker.lpop(scheduler.QUEUE)
        scheduler.dispatch_due(session, settings)
        assert job.row.dispatched_at is not None
        assert broker.llen(scheduler.QUEUE) == scheduler.MOST_WAITING


def test_sigterm_ends_the_scheduler(start: Start, make_job: MakeJob) -> None:
    job = make_job()
    process = start("workers", "scheduler")
    wait_for(lambda: job.row.dispatched_at is not None)
    process.terminate()
    assert process.wait(PATIENCE) == 0


def test_what_a_killed_worker_left_of_a_cancelled_job_goes(
    make_job: MakeJob, session: Session, settings: Settings
) -> None:
    ended, live = make_job(), make_job()
    ended.sql("state = 'cancelled'")
    live.sql("state = 'running'")
    for job in (ended, live):
        for attempt in (0, 1):
            (scratch.folder_of(settings, job.id, attempt) / "output").mkdir(parents=True)
    live.sql("attempt = 1")
    scratch.delete_abandoned(session, settings)
    assert [path.name for path in settings.work_dir.iterdir()] == [f"{live.id}.1"]
