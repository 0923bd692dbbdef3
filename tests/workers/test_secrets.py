"""A Hub token planted in a request is where it is needed, and nowhere else: not in what is stored, written, said or run."""

import asyncio
import subprocess
import sys
import uuid
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
from cryptography.fernet import Fernet
from sqlalchemy import text
from sqlalchemy.orm import Session

from app.auth import service as auth
from app.auth.service import Caller
from app.config import Settings, get_settings
from app.jobs import service
from secateur.catalog.request import JobRequest
from secateur.contract.keys import USER
from tests import hub as fake
from tests.engine.models import english, make_model, make_tokenizer, save
from tests.workers.conftest import ROOT

TOKEN = "hf_" + uuid.uuid4().hex


def ended(process: subprocess.Popen[bytes]) -> bool:
    """Whether it has ended; waits a moment for it, as looking at processes without a pause takes a whole processor."""
    with suppress(subprocess.TimeoutExpired):
        process.wait(0.05)
    return process.returncode is not None


def test_a_planted_token_is_nowhere_to_be_found(
    settings: Settings, session: Session, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:

    monkeypatch.setattr(fake, "TOKEN", TOKEN)
    monkeypatch.setenv("SECATEUR_SECRET_KEYS", Fernet.generate_key().decode())
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.delenv("SECATEUR_HUB_DIR")
    monkeypatch.setenv("HF_HUB_DISABLE_XET", "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    save(make_model("llama"), make_tokenizer(), tmp_path / "source")
    with fake.running() as hub:
        monkeypatch.setenv("SECATEUR_HF_ENDPOINT", hub.url)
        get_settings.cache_clear()
        files = {file.name: file.read_bytes() for file in (tmp_path / "source").iterdir()}
        hub.create("org/private", files=files)
        owner, _ = auth.create(session, "x")
        request = JobRequest.model_validate(
            {
                "model_id": "org/private",
                "target_ratio": 0.3,
                "method": "magnitude",
                "rounds": 2,
                "calibration": {"texts": english("calibration")[:1], "samples": 2, "sequence_length": 32},
                "evaluation": {
                    "texts": english("evaluation")[:1],
                    "samples": 2,
                    "sequence_length": 32,
                    "latency": False,
                },
                "publish": {"repo_id": "org/out"},
                "hub_token": TOKEN,
            }
        )
        job = asyncio.run(service.create(get_settings(), Caller(owner.id, USER), request, None))
        log = tmp_path / "worker.log"
        script = f"""if True:
            import time, uuid
            from app.config import get_settings
            from app.db.session import session_factory
            from app.jobs import leases
            from workers.supervisor import supervise
            claimed = time.monotonic()
            with session_factory()() as session:
                claim = leases.claim(session, uuid.UUID("{job.id}"), "w", 60)
            supervise(claim, claimed, get_settings(), session_factory(), lambda: False)
        """
        with log.open("wb") as output:
            worker = subprocess.Popen([sys.executable, "-c", script], cwd=ROOT, stdout=output, stderr=output)
        seen: set[str] = set()
        while not ended(worker):
            for process in psutil.Process().children(recursive=True):
                try:
                    seen.update([*process.cmdline(), *process.environ().values()])
                except psutil.Error:
                    continue
        session.rollback()
        session.expire_all()
        assert session.get_one(type(job), job.id).state == "succeeded", log.read_text()
        assert len(hub.repositories["org/out"].commits) == 2
        assert any("workers.runner" in value for value in seen) and not any(TOKEN in value for value in seen)
        published = hub.repositories["org/out"].head.files
        assert "secateur.json" in published and not any(TOKEN.encode() in content for content in published.values())
    tables = session.scalars(text("SELECT tablename FROM pg_tables WHERE schemaname = 'public'")).all()
    rows = [str(row) for name in tables for row in session.execute(text(f'SELECT t::text FROM "{name}" t')).all()]
    assert len(rows) > 5 and not any(TOKEN in row for row in rows)
    written = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert log in written and not [path for path in written if TOKEN.encode() in path.read_bytes()]
