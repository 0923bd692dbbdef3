"""Workers that share a database and an object store, and no folder."""

import hashlib
import os
import shutil
import subprocess
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from sqlalchemy.orm import Session

from app.config import Settings, get_settings
from app.storage import service
from app.storage.store import open_store
from tests import s3
from tests.workers.conftest import JobHandle, MakeJob, Start, reap

Supervise = Callable[[JobHandle], subprocess.Popen[bytes]]
Machine = Callable[[str], None]


@pytest.fixture(scope="module")
def endpoint() -> Iterator[str]:
    with s3.running() as address:
        yield address


@pytest.fixture
def on(endpoint: str, settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Machine:
    """Continue as the machine of this name, which has a disk of its own and the common store."""
    for name, value in s3.settings(endpoint, str(uuid.uuid4())).items():
        monkeypatch.setenv(name, value)

    def move(machine: str) -> None:
        monkeypatch.setenv("SECATEUR_DATA_DIR", str(tmp_path / machine))
        get_settings.cache_clear()

    move("first")
    return move


def _worked(job: JobHandle, machine: Path) -> list[list[int]]:
    """The attempt and the step of everything that was worked on at a machine, in order."""
    notes = machine / "notes" / str(job.id) / "notes"
    return [[int(number) for number in line.split()[:2]] for line in notes.read_text().splitlines()]


def test_a_job_moves_between_machines(
    on: Machine, make_job: MakeJob, supervise: Supervise, tmp_path: Path, session: Session
) -> None:
    job = make_job({"wait_in_round": 2}, publish={"repo_id": "org/small", "private": True})
    (tmp_path / "second" / "notes" / str(job.id)).mkdir(parents=True)
    worker = supervise(job)
    job.wait_for_round(1)
    worker.kill()
    worker.wait()
    shutil.rmtree(tmp_path / "first" / "work", ignore_errors=True)  # the machine and its disk are gone
    reap(job)
    on("second")
    (tmp_path / "second" / "notes" / str(job.id) / "go").touch()
    supervise(job).wait()
    assert job.row.state == "succeeded"
    assert [row.attempt for row in job.steps] == [1, 1, 2, 2], "each step once"
    assert _worked(job, tmp_path / "second") == [[2, 2], [2, 3]]
    assert sorted(job.artifacts) == ["model.safetensors", "secateur.json"]
    assert not list((tmp_path / "second" / "work").iterdir())


def test_an_export_is_published_by_another_machine(
    on: Machine, make_job: MakeJob, supervise: Supervise, tmp_path: Path, settings: Settings
) -> None:
    """What is exported is neither pruned nor stored again."""
    job = make_job(publish={"repo_id": "org/small", "private": True})
    supervise(job).wait()
    keys = {name: file.key for name, file in job.artifacts.items()}
    assert settings.hub_dir is not None
    shutil.rmtree(settings.hub_dir)
    job.sql("state = 'queued', result = NULL, finished_at = NULL")
    on("second")
    supervise(job).wait()
    assert (job.row.state, job.row.attempt) == ("succeeded", 2)
    assert {name: file.key for name, file in job.artifacts.items()} == keys
    assert not (tmp_path / "second" / "notes" / str(job.id) / "notes").exists(), "no runner was started"
    published = settings.hub_dir / "org" / "small" / "model.safetensors"
    assert hashlib.sha256(published.read_bytes()).hexdigest() == job.artifacts["model.safetensors"].sha256


@pytest.mark.parametrize("role", ["scheduler", "worker"])
def test_a_process_with_another_storage_does_not_start(
    role: str, start: Start, session: Session, settings: Settings, tmp_path: Path
) -> None:
    service.join(session, open_store(settings))
    environment = os.environ | {"SECATEUR_STORAGE_URL": (tmp_path / "own disk").as_uri()}
    process = start("workers", role, env=environment, stderr=subprocess.PIPE)
    _, said = process.communicate()
    assert process.returncode == 2
    assert b"do not use the same storage. Set SECATEUR_STORAGE_URL" in said and b"Traceback" not in said
