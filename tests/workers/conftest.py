"""Jobs in the database, and processes that work on them; all leases are short."""

import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

import pytest
from huggingface_hub import constants
from sqlalchemy import func, select, text
from sqlalchemy.orm import Session

from app.auth import service as auth
from app.config import Settings, get_settings
from app.jobs import leases
from app.jobs.models import Job, JobEvent, JobStep
from tests import hub as fake
from tests.hub import TOKEN, FakeHub

T = TypeVar("T")
ROOT = Path(__file__).parents[2]
SHORT = {
    "LEASE_TTL": "3",
    "HEARTBEAT_INTERVAL": "0.3",
    "LEASE_MARGIN": "1",
    "SCHEDULER_INTERVAL": "0.2",
    "REDISPATCH_AFTER": "1",
    "RETRY_BACKOFF": "0.01",
}


@pytest.fixture(autouse=True)
def _short_times(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in SHORT.items():
        monkeypatch.setenv(f"SECATEUR_{name}", value)


def wait_for(look: Callable[[], T], timeout: float = 30.0) -> T:
    """What ``look`` returns as soon as it is true."""
    deadline = time.monotonic() + timeout
    while True:
        found = look()
        if found:
            return found
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.05)


def alive(pid: int) -> bool:
    """Whether the process exists and is no zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


class JobHandle:
    """A job in the database, and what its stand-in runner noted in the job's folder."""

    def __init__(self, session: Session, settings: Settings, job_id: uuid.UUID) -> None:
        self.session = session
        self.id = job_id
        self.folder = settings.job_dir(job_id)

    @property
    def row(self) -> Job:
        self.session.rollback()
        job = self.session.get(Job, self.id, populate_existing=True)
        assert job is not None
        return job

    @property
    def steps(self) -> list[JobStep]:
        self.session.rollback()
        query = select(JobStep).where(JobStep.job_id == self.id).order_by(JobStep.number)
        return list(self.session.scalars(query, execution_options={"populate_existing": True}))

    def events(self, type: str) -> list[dict[str, Any]]:
        self.session.rollback()
        query = select(JobEvent.data).where(JobEvent.job_id == self.id, JobEvent.type == type).order_by(JobEvent.id)
        return list(self.session.scalars(query))

    @property
    def worked(self) -> list[tuple[int, int]]:
        """The (attempt, step) that were worked on, in order."""
        return [(attempt, number) for attempt, number, _ in self._notes()]

    @property
    def runner_pid(self) -> int:
        """Of the runner that began a step last."""
        return wait_for(self._notes)[-1][2]

    def _notes(self) -> list[tuple[int, int, int]]:
        notes = self.folder / "notes"
        lines = notes.read_text().splitlines() if notes.exists() else []
        return [(int(a), int(n), int(pid)) for a, n, pid in (line.split() for line in lines)]

    def wait_for_state(self, *states: str, timeout: float = 30.0) -> Job:
        wait_for(lambda: self.row.state in states, timeout)
        return self.row

    def wait_for_round(self, number: int) -> None:
        wait_for(lambda: any(row.number == number for row in self.steps))

    def sql(self, assignment: str) -> None:
        """Change the row behind everyone's back."""
        self.session.execute(text(f"UPDATE jobs SET {assignment} WHERE id = :id"), {"id": self.id})
        self.session.commit()


def reap(job: JobHandle) -> None:
    """Wait until the scheduler would take the job from its worker."""
    settings = get_settings()
    wait_for(lambda: leases.reap(job.session, settings.max_failures, settings.retry_backoff))


def assert_dead_within_the_lease(job: JobHandle, pid: int) -> None:
    """The process ends before the lease that the job has now does, by the database's clock."""
    lease = job.row.lease_expires_at
    wait_for(lambda: not alive(pid))
    now = job.session.execute(select(func.now())).scalar_one()
    job.session.rollback()
    assert lease is not None and now < lease


MakeJob = Callable[..., JobHandle]


@pytest.fixture
def make_job(session: Session, settings: Settings) -> MakeJob:
    """``make_job(script={...}, **request)``: a queued job; ``script`` is for :mod:`tests.workers.standin`."""
    owner, _ = auth.create(session, "test")

    def make(script: dict[str, Any] | None = None, **request: Any) -> JobHandle:
        request = {"model_id": "local:any", "target_ratio": 0.2, "method": "random", "rounds": 3, **request}
        job = Job(owner_id=owner.id, request={**request, "script": script or {}}, model_id="local:any", method="random")
        session.add(job)
        session.commit()
        return JobHandle(session, settings, job.id)

    return make


Start = Callable[..., subprocess.Popen[bytes]]


@pytest.fixture
def start() -> Iterator[Start]:
    """``start(module, *arguments)``: a Python process of the project in a group of its own, dead at the test's end."""
    processes = []

    def begin(module: str, *arguments: object, **popen: Any) -> subprocess.Popen[bytes]:
        argv = [sys.executable, "-m", module, *map(str, arguments)]
        process = subprocess.Popen(argv, cwd=ROOT, process_group=0, **popen)
        processes.append(process)
        return process

    yield begin
    for process in processes:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


@pytest.fixture
def supervise(start: Start) -> Callable[[JobHandle], subprocess.Popen[bytes]]:
    """Start a worker for one attempt at the job, with the stand-in as its runner."""
    return lambda job: start("tests.workers.one_attempt", job.id)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    monkeypatch.setenv("HF_HUB_DISABLE_XET", "1")
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    with fake.running() as running:
        yield running


@pytest.fixture
def service_hub(hub: FakeHub, settings: Settings, monkeypatch: pytest.MonkeyPatch) -> FakeHub:
    """The Hub that jobs are published to."""
    monkeypatch.delenv("SECATEUR_HUB_DIR")
    monkeypatch.setenv("SECATEUR_HF_TOKEN", TOKEN)
    monkeypatch.setenv("SECATEUR_HF_ENDPOINT", hub.url)
    return hub
