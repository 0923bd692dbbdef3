"""Backup and restore as docs/operating.md has them: a job goes on from the round that the backup knows."""

import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from sqlalchemy import make_url
from sqlalchemy.orm import Session

from app.config import Settings, get_settings
from tests.patience import patient_engine
from tests.workers.conftest import JobHandle, MakeJob, reap
from workers.embedded import POSTGRES_BIN

Supervise = Callable[[JobHandle], subprocess.Popen[bytes]]


def postgres(program: str, url: str, *arguments: str) -> None:
    plain = make_url(url).set(drivername="postgresql").render_as_string(hide_password=False)
    libraries = {"LD_LIBRARY_PATH": str(POSTGRES_BIN.parent / "lib")}
    subprocess.run([POSTGRES_BIN / program, "--dbname", plain, *arguments], check=True, env=os.environ | libraries)


def test_jobs_go_on_after_a_restore(
    make_job: MakeJob,
    supervise: Supervise,
    settings: Settings,
    empty_database_url: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    waiting, running = make_job(), make_job({"hang_in_round": 2})
    worker = supervise(running)
    running.wait_for_round(1)
    dump, files = tmp_path / "secateur.dump", tmp_path / "files"
    postgres("pg_dump", settings.database_url, "--format", "custom", "--file", str(dump))  # the database first
    shutil.copytree(settings.data_dir, files)
    worker.kill()
    worker.wait()

    shutil.rmtree(settings.data_dir)
    shutil.copytree(files, settings.data_dir)
    postgres("pg_restore", empty_database_url, str(dump))
    monkeypatch.setenv("SECATEUR_DATABASE_URL", empty_database_url)
    get_settings.cache_clear()
    engine = patient_engine(empty_database_url)
    with Session(engine) as session:
        for job in (waiting, running):
            restored = JobHandle(session, settings, job.id)
            if restored.row.state == "running":  # its worker's lease was in the backup, and runs out
                reap(restored)
            supervise(restored).wait()
            assert restored.row.state == "succeeded"
        assert restored.worked[-2:] == [(2, 2), (2, 3)], "from the last round that the backup knows"
    engine.dispose()
