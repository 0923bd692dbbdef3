"""Log lines say what they are about, from the request to the worker's child; the owner of a job reads the job's lines."""

import datetime as dt
import json
import logging
import subprocess
import sys
import uuid
from collections.abc import Callable
from io import StringIO

import httpx2
import pytest
from sqlalchemy.orm import Session

from app.config import Settings
from app.http import logs
from app.jobs import leases
from app.jobs.leases import LogLine
from app.jobs.models import Job
from secateur.client import Client
from tests.api import play
from tests.forked import secateur as run
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


def write(session: Session, job_id: str, attempt: int, first: int, *texts: str) -> None:
    """Store lines as a worker does with its heartbeat."""
    lines = [LogLine(first + place, dt.datetime.now(dt.UTC), text) for place, text in enumerate(texts)]
    leases.renew(session, uuid.UUID(job_id), attempt, 600, lines)


def test_the_log_of_a_job_in_pages(
    api: httpx2.Client,
    make_client: Callable[[str], httpx2.Client],
    body: dict[str, object],
    session: Session,
    settings: Settings,
) -> None:
    job_id = api.post("/v1/jobs", json=body).json()["id"]
    path = f"/v1/jobs/{job_id}/logs"
    empty = api.get(path)
    assert empty.json()["items"] == [] and empty.json()["next_page_token"] and empty.headers["Retry-After"]
    attempt = play.start(session, job_id)
    write(session, job_id, attempt, 1, "one", "two", "three")
    seen, token = [], empty.json()["next_page_token"]
    for _ in range(2):
        page = api.get(path, params={"page_size": 2, "page_token": token}).json()
        seen += [(item["attempt"], item["number"], item["text"]) for item in page["items"]]
        token = page["next_page_token"]
    assert seen == [(1, 1, "one"), (1, 2, "two"), (1, 3, "three")]
    assert api.get(path, params={"page_token": token}).json() == {"items": [], "next_page_token": token}
    write(session, job_id, attempt, 4, "four")
    play.fail(session, job_id, attempt)
    last = api.get(path, params={"page_token": token})
    assert [item["text"] for item in last.json()["items"]] == ["four"]
    assert last.json()["next_page_token"] is None and "Retry-After" not in last.headers
    assert make_client("bob").get(path).status_code == 404
    for wrong in ("x", "MS4", "OTk5OTk5OTk5OTkuMQ", "MS4xLjE"):
        refused = api.get(path, params={"page_token": wrong})
        assert (refused.status_code, refused.json()["errors"][0]["field"]) == (422, "page_token")
    assert api.delete(f"/v1/jobs/{job_id}").status_code == 204
    assert api.get(path).status_code == 404


def test_the_client_and_the_command_follow_a_log(
    api: httpx2.Client, url: str, body: dict[str, object], session: Session
) -> None:
    job_id = api.post("/v1/jobs", json=body).json()["id"]
    attempt = play.start(session, job_id)
    write(session, job_id, attempt, 1, *[f"line {number}" for number in range(150)])
    key = api.headers["Authorization"].removeprefix("Bearer ")
    with Client(url, key) as client:
        job = client.jobs.get(job_id)
        assert [line.number for line in job.logs()] == list(range(1, 151))
        followed = job.logs(follow=True)
        assert [next(followed).text for _ in range(150)][-1] == "line 149"
        write(session, job_id, attempt, 151, "the last")
        play.fail(session, job_id, attempt)
        assert [line.text for line in followed] == ["the last"]
    environment = {"SECATEUR_URL": url, "SECATEUR_API_KEY": key}
    told = run("logs", job_id, "--follow", environment=environment)
    assert told.returncode == 0 and told.stdout.count("\n") == 151 and told.stdout.endswith("  [1]  the last\n")
    objects = [json.loads(line) for line in run("logs", job_id, "--json", environment=environment).stdout.splitlines()]
    assert objects[-1]["text"] == "the last" and objects[-1]["number"] == 151
