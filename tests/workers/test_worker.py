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
from sqlalchemy import select, update
from sqlalchemy.orm import Session

from app.auth import service as auth
from app.config import Settings
from app.fleet import repository as fleet
from app.fleet import service as workers
from app.jobs import dispatch, leases
from app.jobs.models import Attempt, Job
from secateur.contract.workers import Drain
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
    dispatch.wake_worker()
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
    dispatch.wake_worker()
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
    dispatch.wake_worker()
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
    dispatch.wake_worker()
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
    for _ in range(2 * len(jobs)):
        dispatch.wake_worker()
    with redis.Redis.from_url(settings.broker_url) as broker:
        broker.flushall()
    start_worker()
    start("workers", "scheduler")
    for job in jobs:
        job.wait_for_state("succeeded")
        assert job.row.attempt == 1, "a second ring finds nothing to do"


def test_the_scheduler_wakes_the_idle_workers_that_may_take_a_job(
    make_job: MakeJob, session: Session, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(settings, "heartbeat_interval", 3600.0)
    job = make_job()
    job.sql("required_memory_bytes = 100")
    with redis.Redis.from_url(settings.broker_url) as broker:

        def woken() -> int:
            scheduler.wake_workers(session, settings)
            return int(broker.llen(scheduler.QUEUE))

        assert woken() == 0, "no worker is live"
        for name, memory in (("small", 50), ("large", 100), ("busy", 200)):
            fleet.beat(session, name, "worker", {"memory_bytes": memory})
        running = make_job()
        leases.claim(session, running.id, "busy", 600)
        assert woken() == 2, "the idle ones, because any of them may read the first message"
        assert woken() == 2, "the messages wait already"
        broker.flushall()
        job.sql("required_memory_bytes = 300")
        assert woken() == 0, "no worker can hold it"
        job.sql("required_memory_bytes = 100")
        workers.set_drain(session, "large", Drain.FINISH)
        assert woken() == 0, "the small one cannot hold it"
        workers.set_drain(session, "large", None)
        assert woken() == 2


def test_sigterm_ends_the_scheduler(start: Start, session: Session) -> None:
    process = start("workers", "scheduler")

    def beats() -> bool:
        session.rollback()
        return bool(fleet.live(session, 3600, "scheduler"))

    wait_for(beats)
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


def test_the_second_key_is_next_and_nothing_waits_for_a_second_message(
    make_job: MakeJob, start_worker: StartWorker, session: Session, settings: Settings
) -> None:
    first, *others = [make_job({"wait_in_round": 1} if number == 0 else {}, rounds=1) for number in range(5)]
    start_worker()
    dispatch.wake_worker()
    first.wait_for_round(0)
    other, _ = auth.create(session, "other")
    late = make_job(rounds=1)
    session.execute(update(Job).where(Job.id == late.id).values(owner_id=other.id))
    session.commit()
    first.let_go()
    for job in (first, late, *others):  # without a scheduler: the worker wakes itself after each job
        job.wait_for_state("succeeded")
    session.rollback()
    began = session.scalars(select(Attempt.job_id).order_by(Attempt.started_at)).all()
    assert list(began) == [job.id for job in (first, late, *others)]


def test_a_drained_worker_releases_its_job_at_the_end_of_the_step(
    make_job: MakeJob, start_worker: StartWorker, session: Session, start: Start
) -> None:
    worker = start_worker()
    job = make_job({"wait_in_round": 1})
    dispatch.wake_worker()
    job.wait_for_round(0)
    name = job.row.worker
    drain = start("workers", "workers", "drain", str(name), "--now")
    assert drain.wait(PATIENCE) == 0
    job.wait_for_renewal()  # tells the runner
    job.let_go()
    job.wait_for_state("queued")
    assert (job.row.failures, [row.number for row in job.steps]) == (0, [0, 1])
    start("workers", "scheduler")
    start_worker()
    job.wait_for_state("succeeded")
    assert job.row.attempt == 2 and job.worked[-1] == (2, 3)
    assert worker.poll() is None
