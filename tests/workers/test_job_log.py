"""The log of a job: what its processes write reaches its owner, in bounds; the worker's log says how each attempt ended."""

import logging
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from sqlalchemy import select

from app.config import Settings
from app.db.session import session_factory
from app.jobs import leases, repository, transitions
from app.jobs.leases import LogLine
from app.jobs.models import JobLogLine
from app.jobs.transitions import Trigger
from app.sanitise import Sanitiser
from tests.workers.conftest import JobHandle, MakeJob
from workers import job_log
from workers.job_log import JobLog
from workers.supervisor import supervise as supervise_here

Supervise = Callable[[JobHandle], subprocess.Popen[bytes]]
STANDIN = [sys.executable, "-m", "tests.workers.standin"]


def texts(job: JobHandle) -> list[str]:
    job.session.rollback()
    return [line.text for line in repository.log(job.session, job.id, (0, 0), 10_000)]


def test_what_the_children_write_is_kept_without_paths(
    make_job: MakeJob, supervise: Supervise, settings: Settings
) -> None:
    job = make_job({"bug_in_round": 1})
    supervise(job).wait()
    told = texts(job)
    assert (
        told[0] == "the attempt has begun" and "a library prints to stdout" in told and "and so does its child" in told
    )
    assert "ZeroDivisionError: a bug" in told, "the traceback of a defect"
    assert told[-1].startswith("the attempt ends: internal_error: ")
    assert any("standin.py" in line for line in told)
    for place in (str(Path(__file__).parents[2]), sys.prefix, str(settings.data_dir)):
        assert not any(place in line for line in told), place


def test_a_job_keeps_the_lines_of_all_attempts(make_job: MakeJob, supervise: Supervise) -> None:
    job = make_job({"kill_in_round": 1})
    supervise(job).wait()
    job.sql("not_before = NULL")
    supervise(job).wait()
    assert job.row.state == "succeeded"
    job.session.rollback()
    lines = repository.log(job.session, job.id, (0, 0), 1000)
    assert {line.attempt for line in lines} == {1, 2} and lines[-1].text == "the attempt ends: succeeded"
    assert [(line.attempt, line.number) for line in lines] == sorted((line.attempt, line.number) for line in lines)


@pytest.mark.parametrize(
    ("script", "request_fields", "assignment", "ending"),
    [
        ({}, {}, None, r"succeeded"),
        ({"error_in_round": 1}, {}, None, r"failed: weights_not_finite: The model has NaN weights\."),
        ({"kill_in_round": 1}, {}, None, r"retried: runner_died: The worker's process was killed by SIGKILL.*"),
        ({"hang_in_round": 1}, {}, "state = 'cancelling'", r"cancelled: its owner cancelled the job"),
        ({}, {}, "pause_requested = true", r"paused: its owner paused the job"),
        (
            {"hang_in_round": 1},
            {},
            "attempt = attempt + 1",
            r"lease_lost: worker_lost: attempt 1 no longer owns job .*",
        ),
        (
            {"hang_in_round": 0},
            {"max_runtime_seconds": 1},
            None,
            r"failed: max_runtime_exceeded: The job ran longer .*",
        ),
        ({"hang_in_round": 1}, {}, "SIGTERM", r"released: the worker is shut down"),
    ],
)
def test_one_line_says_how_an_attempt_ended(
    script: dict[str, object],
    request_fields: dict[str, object],
    assignment: str | None,
    ending: str,
    make_job: MakeJob,
    settings: Settings,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    job = make_job(script, **request_fields)
    caplog.set_level(logging.INFO, "workers.supervisor")
    ended = False

    def meddle(*_: object) -> None:
        nonlocal ended
        if assignment == "SIGTERM":
            ended = True
        elif assignment is not None:
            job.sql(assignment)

    started = JobLog.add

    def add(log: JobLog, text: str) -> None:
        started(log, text)
        if text == "the attempt has begun":
            meddle()

    monkeypatch.setattr(JobLog, "add", add)
    claimed = time.monotonic()
    claim = leases.claim(job.session, job.id, "test", settings.lease_ttl)
    assert claim is not None
    supervise_here(claim, claimed, settings, session_factory(), lambda: ended, STANDIN)
    [line] = [record for record in caplog.records if record.getMessage().startswith("the attempt has ended")]
    assert re.fullmatch(f"the attempt has ended: {ending}", line.getMessage()), line.getMessage()
    assert "\n" not in line.getMessage()
    parts = line.getMessage().split(": ")
    assert vars(line)["outcome"] == parts[1] and vars(line)["code"] in (None, parts[2] if len(parts) > 2 else None)


@pytest.fixture
def log(settings: Settings) -> JobLog:
    return JobLog(Sanitiser(settings))


def test_lines_are_bounded_and_plain(log: JobLog) -> None:
    log.add("Loading:  10%\rLoading:  50%\rLoading: 100%\r\n")
    log.add("\x1b[31mred\x1b[0m \x07bell \ud800 and\tmore\n\n")
    log.add("x" * 100_000)
    assert [line.text for line in log.take()] == [
        "Loading: 100%", "red bell  and\tmore", "x" * job_log.LONGEST + "…",
    ]  # fmt: skip


def test_lines_are_taken_until_they_are_stored(log: JobLog) -> None:
    log.add("a")
    assert [(line.number, line.text) for line in log.take()] == [(1, "a")]
    log.add("b")
    assert [(line.number, line.text) for line in log.take()] == [(1, "a"), (2, "b")]
    log.stored()
    assert log.take() == []


def test_a_flood_says_what_it_washed_away(log: JobLog) -> None:
    for number in range(repository.LOG_LINES + 5):
        log.add(str(number))
    lines = log.take()
    assert len(lines) == repository.LOG_LINES and lines[-1].text == str(repository.LOG_LINES + 4)
    assert lines[0].text == "(6 lines are left out here.)" and lines[1].text == "6"
    log.add("later")
    assert log.take()[-1].number == lines[-1].number + 1


def claimed(job: JobHandle) -> int:
    claim = leases.claim(job.session, job.id, "w", 600)
    assert claim is not None
    return claim.attempt


def lines(settings: Settings, first: int, count: int, text: str = "x") -> list[LogLine]:
    log = JobLog(Sanitiser(settings))
    for _ in range(count):
        log.add(text)
    return [LogLine(first + place, line.written_at, line.text) for place, line in enumerate(log.take())]


def test_a_job_keeps_its_newest_lines(make_job: MakeJob, settings: Settings) -> None:
    job = make_job()
    attempt = claimed(job)
    for first in (1, 801, 801):  # the second batch is sent twice
        leases.renew(job.session, job.id, attempt, 600, lines(settings, first, 800))
    query = select(JobLogLine.number).where(JobLogLine.job_id == job.id).order_by(JobLogLine.number)
    assert list(job.session.scalars(query)) == list(range(601, 1601))
    leases.renew(job.session, job.id, attempt, 600, lines(settings, 1601, 900, "y" * 1000))
    kept = list(job.session.scalars(query))
    assert kept[-1] == 2500 and repository.LOG_BYTES - 1000 <= 1000 * len(kept) <= repository.LOG_BYTES


def test_lines_are_fenced_and_go_with_the_job(make_job: MakeJob, settings: Settings) -> None:
    job = make_job()
    attempt = claimed(job)
    leases.renew(job.session, job.id, attempt, 600, lines(settings, 1, 2))
    job.sql("attempt = attempt + 1")
    with pytest.raises(leases.LeaseLost):
        leases.renew(job.session, job.id, attempt, 600, lines(settings, 3, 2))
    assert len(texts(job)) == 2
    row = transitions.lock(job.session, job.id)
    assert row is not None
    transitions.apply(job.session, row, Trigger.FAIL)
    repository.delete(job.session, row)
    job.session.commit()
    assert job.session.scalars(select(JobLogLine)).all() == []
