"""Jobs in the database, and processes that work on them. Intervals are short; leases are long, except where a test is about their end."""

import datetime as dt
import os
import signal
import subprocess
import sys
import uuid
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import constants
from sqlalchemy import func, select, text
from sqlalchemy.orm import Session

from app.auth import service as auth
from app.config import Settings, get_settings
from app.jobs import leases
from app.jobs.leases import Patience
from app.jobs.models import Job, JobEvent, JobStep
from app.storage import repository as storage
from app.storage.models import StoredFile
from app.storage.store import open_store
from secateur.contract.keys import KeySettings
from tests import hub as fake
from tests.hub import TOKEN, FakeHub
from tests.patience import PATIENCE, wait_for
from tests.workers.standin import SHORT_LEASE

ROOT = Path(__file__).parents[2]
SHORT = {
    "LEASE_TTL": "600",
    "HEARTBEAT_INTERVAL": "0.3",
    "LEASE_MARGIN": "60",
    "SCHEDULER_INTERVAL": "0.2",
    "RETRY_BACKOFF": "0.01",
}


@pytest.fixture(autouse=True)
def _short_times(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in SHORT.items():
        monkeypatch.setenv(f"SECATEUR_{name}", value)


def alive(pid: int) -> bool:
    """Whether the process exists and is no zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


class JobHandle:
    """A job in the database, and what its stand-in runner noted in a folder of its own."""

    def __init__(self, session: Session, settings: Settings, job_id: uuid.UUID) -> None:
        self.session = session
        self.id = job_id
        self.folder = settings.data_dir / "notes" / str(job_id)
        self.folder.mkdir(parents=True, exist_ok=True)

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

    @property
    def artifacts(self) -> dict[str, StoredFile]:
        """The recorded files of the pruned model, all of which are in the object store."""
        self.session.rollback()
        found = {file.name: file for file in storage.files(self.session, self.id)}
        store = open_store(get_settings())
        assert all(len(store.read(file.key, 2**30)) == file.size for file in found.values())
        return found

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
        """The process id of the runner that began a step last."""
        return wait_for(self._notes)[-1][2]

    def _notes(self) -> list[tuple[int, int, int]]:
        notes = self.folder / "notes"
        lines = notes.read_text().splitlines() if notes.exists() else []
        return [(int(a), int(n), int(pid)) for a, n, pid in (line.split() for line in lines)]

    def wait_for_state(self, *states: str, timeout: float = PATIENCE) -> Job:
        wait_for(lambda: self.row.state in states, timeout)
        return self.row

    def wait_for_round(self, number: int) -> None:
        wait_for(lambda: any(row.number == number for row in self.steps))

    def wait_for_renewal(self) -> None:
        """Wait until the worker renews its lease."""
        before = self.row.lease_expires_at
        wait_for(lambda: self.row.lease_expires_at != before)

    def let_go(self) -> None:
        """Let a runner go on that waits in the round ``wait_in_round`` of its script."""
        (self.folder / "go").touch()

    def sql(self, assignment: str) -> None:
        """Change the row behind everyone's back."""
        self.session.execute(text(f"UPDATE jobs SET {assignment} WHERE id = :id"), {"id": self.id})
        self.session.commit()


def expire(job: JobHandle) -> None:
    """End the job's lease now. Its worker is dead or frozen, or the lease would be renewed.

    A worker that was frozen within a transaction holds the row until the server ends its session.
    """
    free = "SELECT id FROM jobs WHERE id = :id AND lease_expires_at IS NOT NULL FOR UPDATE SKIP LOCKED"
    statement = f"UPDATE jobs SET lease_expires_at = now() - interval '1 second' WHERE id IN ({free}) RETURNING id"

    def end() -> bool:
        ended = job.session.execute(text(statement), {"id": job.id}).first() is not None
        job.session.commit()
        return ended

    wait_for(end)


def reap(job: JobHandle) -> None:
    """End the lease of a job whose worker is dead or frozen, and take the job from it as the scheduler does."""
    expire(job)
    settings = get_settings()
    wait_for(lambda: leases.reap(job.session, Patience.of(settings)))


def shorten_lease(job: JobHandle, worker: subprocess.Popen[bytes]) -> None:
    """Have a worker (:mod:`tests.workers.one_attempt`) take leases whose child dies seconds, not minutes, after a renewal.

    A worker starts with long leases: on a busy machine a short one would end while the child is still starting.
    """
    worker.send_signal(signal.SIGUSR1)

    def left() -> dt.timedelta:
        job.session.rollback()
        query = select(Job.lease_expires_at - func.now()).where(Job.id == job.id)
        remaining: dt.timedelta = job.session.execute(query).scalar_one()  # type: ignore[assignment]
        return remaining

    wait_for(lambda: left() < dt.timedelta(seconds=2 * SHORT_LEASE["lease_ttl"]))
    job.wait_for_renewal()  # the child is told of a lease after the database is, and before the next one


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
    owner, _ = auth.create(session, "test", settings=KeySettings(namespace="org", lend_hub_token=True))

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
