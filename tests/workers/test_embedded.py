"""The servers from wheels: started, killed, started again, below folders that others may not enter."""

import datetime as dt
import os
import signal
import subprocess
import sys
from pathlib import Path

import psycopg
import pytest
from sqlalchemy.orm import Session

from app.auth import service as auth
from app.config import Settings
from app.db.migrate import upgrade
from app.jobs.models import Job
from secateur.processes import spawn
from tests.patience import PATIENCE, patient_engine
from tests.workers.conftest import ROOT, JobHandle, Start, alive, reap, shorten_lease, wait_for
from workers.embedded import EmbeddedError, free_port, start_postgres


def query(url: str, statement: str) -> list[tuple[object, ...]]:
    with psycopg.connect(url.replace("+psycopg", ""), autocommit=True) as connection:
        cursor = connection.execute(statement)
        return cursor.fetchall() if cursor.description else []


def test_postgres_under_a_closed_folder_survives_kill_9(tmp_path: Path) -> None:
    closed = tmp_path / "closed"
    closed.mkdir(mode=0o700)
    port = free_port()
    server = start_postgres(closed / "postgres", port)
    query(server.url, "CREATE TABLE kept AS SELECT 42 AS answer")
    assert query(server.url, "SHOW data_directory") == [(str(closed / "postgres" / "data"),)]
    os.kill(server.process.pid, signal.SIGKILL)
    server.process.wait()
    server = start_postgres(closed / "postgres", port)
    assert query(server.url, "SELECT answer FROM kept") == [(42,)]
    server.stop()
    assert server.process.returncode == 0
    assert closed.stat().st_mode & 0o777 == 0o700, "no parent was opened"


def test_postgres_asks_for_the_password(postgres: object, database_url: str) -> None:
    with pytest.raises(psycopg.OperationalError, match="password"):
        query(database_url.replace("postgres:", "postgres:not", 1), "SELECT 1")


def test_a_lock_file_with_somebody_elses_pid_is_no_hindrance(tmp_path: Path) -> None:
    folder, port = tmp_path / "postgres", free_port()
    server = start_postgres(folder, port, durable=False)
    lock = folder / "data" / "postmaster.pid"
    content = lock.read_text()
    server.process.kill()
    server.process.wait()
    owner = folder.stat()
    user = None if owner.st_uid == os.geteuid() else (owner.st_uid, owner.st_gid, None)
    stranger = spawn(["/bin/sleep", "60"], user=user)
    lock.write_text(content.replace(str(server.process.pid), str(stranger.pid), 1))
    start_postgres(folder, port, durable=False).stop()
    stranger.kill()
    stranger.wait()


def test_a_taken_port_is_said(tmp_path: Path, postgres: object, database_url: str) -> None:
    port = psycopg.conninfo.conninfo_to_dict(database_url.replace("+psycopg", ""))["port"]
    with pytest.raises(EmbeddedError, match="Address already in use"):
        start_postgres(tmp_path / "postgres", int(str(port)), durable=False)


PARENT = """
import subprocess, sys, time
from secateur.processes import spawn
child = spawn([sys.executable, "-c", "import time; time.sleep(3600)"])
print(child.pid, flush=True)
time.sleep(3600)
"""


def test_a_child_dies_with_its_parent() -> None:
    parent = subprocess.Popen([sys.executable, "-c", PARENT], cwd=ROOT, stdout=subprocess.PIPE)
    assert parent.stdout is not None
    pid = int(parent.stdout.readline())
    assert alive(pid)
    parent.kill()
    parent.wait()
    wait_for(lambda: not alive(pid))


def test_a_child_whose_timer_is_not_renewed_dies_though_it_ignores_signals() -> None:
    stubborn = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(3600)"
    child = spawn([sys.executable, "-c", stubborn], timer=0.5)
    assert child.wait(PATIENCE) == -signal.SIGALRM


def test_the_runner_is_dead_before_the_lease_ends_when_the_database_is_gone(
    tmp_path: Path, start: Start, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The job lives in a database of its own, whose server is killed and later comes back."""
    folder, port = tmp_path / "postgres", free_port()
    server = start_postgres(folder, port, durable=False)
    upgrade(server.url)
    monkeypatch.setenv("SECATEUR_DATABASE_URL", server.url)
    engine = patient_engine(server.url)
    request = {
        "model_id": "local:any",
        "target_ratio": 0.3,
        "method": "random",
        "rounds": 1,
        "script": {"hang_in_round": 1},
    }
    with Session(engine) as session:
        owner, _ = auth.create(session, "test")
        job = Job(owner_id=owner.id, request=request, model_id="local:any", method="random")
        session.add(job)
        session.commit()
        job_id = job.id
    worker = start("tests.workers.one_attempt", job_id)
    notes = settings.data_dir / "notes" / str(job_id) / "notes"
    wait_for(lambda: notes.exists() and notes.read_text().count("\n") == 2)
    pid = int(notes.read_text().split()[-1])
    with Session(engine) as session:
        shorten_lease(JobHandle(session, settings, job_id), worker)
        lease = session.get_one(Job, job_id, populate_existing=True).lease_expires_at
    server.process.kill()
    server.process.wait()
    wait_for(lambda: not alive(pid))
    assert lease is not None and dt.datetime.now(dt.UTC) < lease, "by the clock that the database has, too"
    server = start_postgres(folder, port, durable=False)
    worker.wait(PATIENCE)
    engine.dispose()
    with Session(engine) as session:
        row = session.get_one(Job, job_id)
        if row.state == "running":  # the database came back too late for the worker to give the job back
            reap(JobHandle(session, settings, job_id))
            session.refresh(row)
        assert (row.state, row.attempt) == ("queued", 1)
    engine.dispose()
    server.stop()
