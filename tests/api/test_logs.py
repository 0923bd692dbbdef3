"""Log lines say what they are about, from the request to the worker's child."""

import json
import logging
import subprocess
import sys
from io import StringIO

import httpx2
import pytest
from sqlalchemy.orm import Session

from app.config import Settings
from app.http import logs
from app.jobs.models import Job
from tests.workers.conftest import ROOT


@pytest.mark.parametrize("log_format", ["text", "json"])
def test_what_a_line_says(log_format: str, settings: Settings) -> None:
    written, logger = StringIO(), logging.Logger("secateur.test")
    logger.addHandler(logging.StreamHandler(written))
    logs.adopt(logger.handlers, settings.model_copy(update={"log_format": log_format}))
    with logs.about(request_id="r", job_id=None), logs.about(job_id="j", attempt=2):
        logger.warning("the %s", "message")
    logger.info("apart")
    first, second = written.getvalue().splitlines()
    if log_format == "text":
        assert first.endswith("WARNING secateur.test request_id=r job_id=j attempt=2: the message")
        return
    line = json.loads(first)
    assert line.pop("time").startswith("20")
    about = {"request_id": "r", "job_id": "j", "attempt": 2}
    assert line == {"level": "WARNING", "logger": "secateur.test", "message": "the message"} | about
    assert not about.keys() & json.loads(second).keys()


def test_a_job_keeps_the_id_of_its_request(api: httpx2.Client, body: dict[str, object], session: Session) -> None:
    api.post("/v1/jobs", json=body, headers={"X-Request-Id": "mine"}).raise_for_status()
    assert session.query(Job).one().request_id == "mine"


def test_the_scheduler_writes_json(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECATEUR_LOG_FORMAT", "json")
    script = (
        "import logging; from app.config import get_settings; from app.http import logs; logs.configure(get_settings());"
        "logging.getLogger('x').info('y')"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT)
    line = json.loads(done.stderr)
    assert (line["logger"], line["message"], line["level"]) == ("x", "y", "INFO")
