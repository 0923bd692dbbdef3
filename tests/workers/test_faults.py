"""The worst moments, each on its own: what chaos finds by chance is made to happen here."""

import os
import signal
import subprocess
import sysconfig
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
from sqlalchemy import func, select
from sqlalchemy.orm import Session

from app.auth import service as auth
from app.config import get_settings
from app.db.migrate import upgrade
from app.db.session import session_factory
from app.jobs import leases
from app.jobs.leases import Patience
from app.jobs.models import Job
from secateur.contract.keys import KeySettings
from tests.hub import FakeHub, Repository
from tests.patience import PATIENCE, patient_engine
from tests.workers.conftest import (
    JobHandle,
    MakeJob,
    Start,
    assert_dead_within_the_lease,
    reap,
    shorten_lease,
    wait_for,
)
from tests.workers.standin import SHORT_LEASE
from workers.embedded import free_port, start_postgres

REPO = "org/small"
PUBLISHED = {"repo_id": REPO, "private": True}
Supervise = Callable[[JobHandle], subprocess.Popen[bytes]]


def child(worker: subprocess.Popen[bytes], module: str) -> psutil.Process:
    [found] = [
        each for each in psutil.Process(worker.pid).children(recursive=True) if module in " ".join(each.cmdline())
    ]
    return found


def test_a_publisher_frozen_in_mid_upload_is_overtaken_and_wakes_to_nothing(
    service_hub: FakeHub, make_job: MakeJob, supervise: Supervise
) -> None:
    job = make_job(publish=PUBLISHED)
    zombie = supervise(job)
    frozen: list[psutil.Process] = []
    too_late: list[float] = []

    def freeze() -> None:
        if not frozen:
            shorten_lease(job, zombie)
            frozen.extend([child(zombie, "workers.publisher"), psutil.Process(zombie.pid)])
            for process in frozen:
                process.suspend()
            too_late.append(time.monotonic() + SHORT_LEASE["lease_ttl"] - SHORT_LEASE["lease_margin"])

    service_hub.before_upload = freeze
    wait_for(lambda: too_late)
    reap(job)
    supervise(job).wait()
    assert (job.row.state, job.row.attempt) == ("succeeded", 2)
    commits = service_hub.repositories[REPO].commits
    assert len(commits) == 2
    wait_for(lambda: time.monotonic() > too_late[0])
    for process in frozen:
        process.resume()
    zombie.wait()
    wait_for(lambda: not frozen[0].is_running())
    row = job.row
    assert (row.state, row.attempt, row.result and row.result["commit_sha"]) == ("succeeded", 2, commits[-1].sha)
    assert len(commits) == 2


def test_a_commit_that_was_long_on_its_way_is_refused(
    service_hub: FakeHub, make_job: MakeJob, supervise: Supervise
) -> None:
    """The network holds the commit of the first attempt back until the second has committed."""
    job = make_job(publish=PUBLISHED)
    first, overtaken = supervise(job), threading.Event()
    held, arrived = threading.Event(), threading.Event()

    def hold(repository: Repository) -> None:
        if not held.is_set():
            held.set()
            service_hub.lock.release()  # others are served meanwhile
            overtaken.wait()
            service_hub.lock.acquire()
            arrived.set()

    service_hub.before_commit = hold
    assert held.wait(PATIENCE)
    first.kill()
    reap(job)
    supervise(job).wait()
    assert (job.row.state, job.row.attempt) == ("succeeded", 2)
    overtaken.set()
    assert arrived.wait(PATIENCE)
    with service_hub.lock:  # which is free when the commit is answered
        assert len(service_hub.repositories[REPO].commits) == 2


def test_a_kill_between_the_checkpoint_and_its_row(make_job: MakeJob, supervise: Supervise) -> None:
    job = make_job({"kill_worker_after_checkpoint": 2})
    supervise(job).wait()
    assert (job.folder / "told-2").exists() and [row.number for row in job.steps] == [0, 1]
    reap(job)
    supervise(job).wait()
    assert job.row.state == "succeeded"
    assert job.worked == [(1, 0), (1, 1), (1, 2), (2, 2), (2, 3)], "of what has no row nothing is known"
    assert [(row.number, row.attempt) for row in job.steps] == [(0, 1), (1, 1), (2, 2), (3, 2)]


def test_a_runner_that_holds_the_interpreter_lock_is_dead_before_the_lease_ends(
    make_job: MakeJob, supervise: Supervise
) -> None:
    job = make_job({"wait_in_round": 1, "hold_gil_in_round": 1})
    supervisor = supervise(job)
    pid = job.runner_pid
    job.wait_for_round(0)
    shorten_lease(job, supervisor)
    supervisor.send_signal(signal.SIGSTOP)
    job.let_go()
    assert_dead_within_the_lease(job, pid)
    supervisor.kill()
    reap(job)
    supervise(job).wait()
    assert job.row.state == "succeeded" and job.worked[-1] == (2, 3)


SHIM = """
#define _GNU_SOURCE
#include <dlfcn.h>
#include <fcntl.h>
#include <stdlib.h>
#include <sys/time.h>
#include <time.h>
#include <unistd.h>
static long jump(void) {
    char text[32] = {0};
    int file = open(getenv("CLOCK_JUMP"), O_RDONLY);
    if (file < 0) return 0;
    if (read(file, text, sizeof text - 1) < 0) text[0] = 0;
    close(file);
    return atol(text);
}
int clock_gettime(clockid_t clock, struct timespec *now) {
    static int (*real)(clockid_t, struct timespec *);
    if (!real) real = dlsym(RTLD_NEXT, "clock_gettime");
    int result = real(clock, now);
    if (clock == CLOCK_REALTIME) now->tv_sec += jump();
    return result;
}
time_t time(time_t *result) {
    struct timespec now;
    clock_gettime(CLOCK_REALTIME, &now);
    if (result) *result = now.tv_sec;
    return now.tv_sec;
}
"""
"""The clock of the wall, off by as many seconds as a file says."""


@pytest.mark.parametrize("seconds", [-86_400, 86_400])
def test_a_clock_that_jumps_neither_keeps_nor_loses_a_lease(
    seconds: int, make_job: MakeJob, start: Start, tmp_path: Path
) -> None:
    shim, jump = tmp_path / "shim.so", tmp_path / "jump"
    (tmp_path / "shim.c").write_text(SHIM)
    compiler = (sysconfig.get_config_var("CC") or "gcc").split()[0]
    subprocess.run([compiler, "-shared", "-fPIC", "-o", shim, tmp_path / "shim.c", "-ldl"], check=True)
    environment = os.environ | {"LD_PRELOAD": str(shim), "CLOCK_JUMP": str(jump)}
    job = make_job({"wait_in_round": 1})
    worker = start("tests.workers.one_attempt", job.id, env=environment)
    job.wait_for_round(0)
    jump.write_text(str(seconds))
    for _ in range(3):
        job.wait_for_renewal()
    lease, now = job.session.execute(select(Job.lease_expires_at, func.now())).one()
    assert lease is not None and 0 < (lease - now).total_seconds() < get_settings().lease_ttl + 1, (
        "by the database's clock"
    )
    job.session.rollback()
    assert not leases.reap(job.session, Patience.of(get_settings()))
    job.let_go()
    worker.wait()
    assert (job.row.state, job.row.attempt, job.row.failures) == ("succeeded", 1, 0)


@pytest.fixture
def own_database(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[], None]]:
    """A server for this test alone, in the settings; call to kill it and have it come back."""
    folder, port = tmp_path / "postgres", free_port()
    server = start_postgres(folder, port)
    upgrade(server.url)
    monkeypatch.setenv("SECATEUR_DATABASE_URL", server.url)
    get_settings.cache_clear()
    session_factory.cache_clear()

    def restart() -> None:
        nonlocal server
        server.process.kill()
        server.process.wait()
        time.sleep(0.5)
        server = start_postgres(folder, port)

    yield restart
    server.stop()


def test_a_database_that_restarts_during_publishing(
    service_hub: FakeHub, own_database: Callable[[], None], start: Start
) -> None:
    settings = get_settings()
    engine = patient_engine(settings.database_url)
    request = {"model_id": "local:any", "target_ratio": 0.2, "method": "random", "rounds": 1}
    with Session(engine) as session:
        owner, _ = auth.create(session, "test", settings=KeySettings(namespace="org", lend_hub_token=True))
        made = Job(
            owner_id=owner.id, request=request | {"script": {}, "publish": PUBLISHED}, model_id="x", method="random"
        )
        session.add(made)
        session.commit()
        job_id = made.id
    due, done = threading.Event(), threading.Event()

    def interrupt(repository: Repository) -> None:
        due.set()
        done.wait(PATIENCE)

    service_hub.before_commit = interrupt
    worker = start("tests.workers.one_attempt", job_id)
    assert due.wait(PATIENCE)
    own_database()
    done.set()
    worker.wait()
    engine.dispose()
    with Session(engine) as session:
        job = JobHandle(session, settings, job_id)
        if job.row.state != "succeeded":  # the lease was over before the database was back
            if job.row.state != "queued":
                reap(job)
            start("tests.workers.one_attempt", job_id).wait()
        assert job.row.state == "succeeded"
    engine.dispose()
    assert len(service_hub.repositories[REPO].commits) == 2
