"""One attempt at a job, with real processes: what is killed, when, and what is left."""

import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from sqlalchemy import func, select
from sqlalchemy.orm import Session

from app.config import Settings
from app.db.session import make_engine
from app.jobs import leases, transitions
from app.jobs.leases import Patience
from app.jobs.models import Job, JobStep
from app.jobs.transitions import Trigger
from tests.workers.conftest import (
    JobHandle,
    MakeJob,
    alive,
    assert_dead_within_the_lease,
    reap,
    shorten_lease,
    wait_for,
)

Supervise = Callable[[JobHandle], subprocess.Popen[bytes]]


def ask(job: JobHandle, trigger: Trigger) -> None:
    """What the API does when it is asked to pause, resume or cancel."""
    row = transitions.lock(job.session, job.id)
    assert row is not None
    transitions.apply(job.session, row, trigger)
    job.session.commit()


def test_a_job_runs_to_its_end(make_job: MakeJob, supervise: Supervise, settings: Settings) -> None:
    job = make_job(publish={"repo_id": "org/small", "private": True})
    supervise(job).wait()
    row = job.row
    assert (row.state, row.attempt, row.failures, row.error) == ("succeeded", 1, 0, None)
    assert row.result is not None and row.result["repo_id"] == "org/small" and row.result["parameters"]["after"] == 8
    assert len(row.result["commit_sha"]) == 40 and "url" not in row.result, "a path is no address for others"
    assert row.report is not None and row.report["perplexity"] == {"before": 10.0, "after": None}, "NaN is no JSON"
    assert row.progress is not None and row.progress["share"] == 1.0 and row.progress["steps"] == 3
    assert [(r.number, r.data["perplexity"]) for r in job.steps] == [(0, 10.0), (1, 11.0), (2, 12.0), (3, 13.0)]
    assert sorted(job.artifacts) == ["model.safetensors", "secateur.json"]
    assert not list(settings.work_dir.iterdir()), "nothing is kept on the worker's disk"


def test_without_a_repository_the_files_are_artifacts(
    make_job: MakeJob, supervise: Supervise, settings: Settings
) -> None:
    job = make_job()
    supervise(job).wait()
    assert job.row.state == "succeeded"
    assert "secateur.json" in job.artifacts
    assert settings.hub_dir is not None and not settings.hub_dir.exists()


def test_an_attempt_leaves_nothing_on_the_disk(make_job: MakeJob, supervise: Supervise, settings: Settings) -> None:
    job = make_job({"hang_in_round": 2})
    supervisor = supervise(job)
    job.wait_for_round(1)
    [folder] = settings.work_dir.iterdir()
    assert folder.name == f"{job.id}.1" and [path.name for path in folder.iterdir()] == ["tmp"]
    (folder / "half-written").mkdir()
    ask(job, Trigger.CANCEL)
    supervisor.wait()
    assert not folder.exists()


def test_a_job_that_is_not_there_to_be_taken_is_left_alone(make_job: MakeJob, supervise: Supervise) -> None:
    job = make_job()
    job.sql("state = 'paused'")
    assert supervise(job).wait() == 0
    assert (job.row.state, job.row.attempt) == ("paused", 0)


def test_a_round_ends_when_it_is_recorded(make_job: MakeJob, supervise: Supervise) -> None:
    """The engine deletes what only earlier steps need: a later attempt must not be sent back to them."""
    job = make_job({"wait_in_round": 1})
    supervisor = supervise(job)
    job.wait_for_round(0)
    transitions.lock(job.session, job.id)  # the supervisor cannot write
    recorded = job.session.execute(select(func.max(JobStep.number)).where(JobStep.job_id == job.id)).scalar_one()
    job.let_go()
    wait_for(lambda: (job.folder / "told-1").exists())
    time.sleep(1)  # in which it would go on
    assert recorded == 0 and job.worked[-1] == (1, 1)
    job.session.rollback()
    supervisor.wait()
    assert job.row.state == "succeeded"


def test_the_runner_dies_with_its_supervisor(make_job: MakeJob, supervise: Supervise) -> None:
    job = make_job({"hang_in_round": 2})
    supervisor = supervise(job)
    job.wait_for_round(1)
    supervisor.kill()
    wait_for(lambda: not alive(job.runner_pid))  # its lease is longer than this waits
    reap(job)
    assert (job.row.state, job.row.failures, job.row.losses) == ("queued", 0, 1)
    supervise(job).wait()
    assert job.row.state == "succeeded"
    assert job.worked[-2:] == [(2, 2), (2, 3)], "resumed after step 1"


def test_the_runner_of_a_frozen_supervisor_is_dead_before_the_lease_ends(
    make_job: MakeJob, supervise: Supervise
) -> None:
    job = make_job({"hang_in_round": 1})
    supervisor = supervise(job)
    pid = job.runner_pid
    shorten_lease(job, supervisor)
    supervisor.send_signal(signal.SIGSTOP)
    assert_dead_within_the_lease(job, pid)
    supervisor.send_signal(signal.SIGCONT)
    supervisor.wait()
    assert job.row.failures == 0, "no fault of the job's"


def test_a_frozen_supervisor_that_wakes_too_late_writes_nothing(make_job: MakeJob, supervise: Supervise) -> None:
    job = make_job({"hang_in_round": 1})
    frozen = supervise(job)
    job.wait_for_round(0)
    pid = job.runner_pid
    shorten_lease(job, frozen)
    frozen.send_signal(signal.SIGSTOP)
    wait_for(lambda: not alive(pid))  # from now on it is too late
    reap(job)
    supervise(job).wait()
    before = job.row
    assert (before.state, before.attempt) == ("succeeded", 2)
    version = before.version
    frozen.send_signal(signal.SIGCONT)
    frozen.wait()
    assert (job.row.state, job.row.version) == ("succeeded", version)
    assert "secateur.json" in job.artifacts


def test_a_row_that_a_vanished_worker_had_locked_is_freed(make_job: MakeJob, settings: Settings) -> None:
    """A process that freezes within a transaction keeps its locks; reaping passes over locked rows."""
    job = make_job()
    engine = make_engine(settings.database_url)
    with engine.connect() as connection:
        timeout = connection.exec_driver_sql("SHOW idle_in_transaction_session_timeout").scalar_one()
        assert timeout == "15s" and Settings.model_fields["lease_ttl"].default > 15
        leases.claim(job.session, job.id, "test", ttl=0.0)
        connection.execute(select(Job).where(Job.id == job.id).with_for_update())
        assert not leases.reap(job.session, Patience.of(settings))
        connection.exec_driver_sql("SET idle_in_transaction_session_timeout = 200")
        wait_for(lambda: leases.reap(job.session, Patience.of(settings)))
        connection.invalidate()
    engine.dispose()


def test_the_runner_is_killed_when_another_attempt_owns_the_job(make_job: MakeJob, supervise: Supervise) -> None:
    job = make_job({"hang_in_round": 1})
    supervisor = supervise(job)
    pid = job.runner_pid
    job.sql("attempt = attempt + 1")
    supervisor.wait()
    assert not alive(pid)
    assert (job.row.state, job.row.attempt, job.row.failures) == ("running", 2, 0)


def test_cancel(make_job: MakeJob, supervise: Supervise) -> None:
    job = make_job({"hang_in_round": 1})
    supervisor = supervise(job)
    pid = job.runner_pid
    ask(job, Trigger.CANCEL)
    supervisor.wait()
    assert job.row.state == "cancelled"
    assert not alive(pid)


def test_a_cancel_wins_over_publishing(make_job: MakeJob, supervise: Supervise, settings: Settings) -> None:
    job = make_job({"wait_in_round": 3}, publish={"repo_id": "org/small", "private": True})
    supervisor = supervise(job)
    job.wait_for_round(2)
    job.sql("state = 'cancelling'")
    job.let_go()
    supervisor.wait()
    assert job.row.state == "cancelled"
    assert settings.hub_dir is not None and not settings.hub_dir.exists()


def test_pause_takes_effect_at_the_rounds_end_and_resume_goes_on(make_job: MakeJob, supervise: Supervise) -> None:
    job = make_job({"wait_in_round": 1})
    supervisor = supervise(job)
    job.wait_for_round(0)
    ask(job, Trigger.PAUSE)
    job.let_go()
    supervisor.wait()
    assert (job.row.state, job.row.lease_expires_at) == ("paused", None)
    done = job.steps[-1].number
    assert done < 3
    ask(job, Trigger.RESUME)
    supervise(job).wait()
    assert (job.row.state, job.row.failures) == ("succeeded", 0)
    assert [number for attempt, number in job.worked if attempt == 2] == list(range(done + 1, 4))


def test_a_pause_that_is_withdrawn_just_in_time_requeues(session: Session, make_job: MakeJob) -> None:
    job = make_job()
    claim = leases.claim(session, job.id, "test", 60)
    assert claim is not None
    assert leases.release(session, job.id, claim.attempt) == "queued"


def test_sigterm_gives_the_job_back_without_a_failure(make_job: MakeJob, supervise: Supervise) -> None:
    job = make_job({"hang_in_round": 2})
    supervisor = supervise(job)
    job.wait_for_round(1)
    pid = job.runner_pid
    supervisor.terminate()
    assert supervisor.wait() == 0
    assert not alive(pid)
    assert (job.row.state, job.row.failures) == ("queued", 0)
    supervise(job).wait()
    assert job.row.state == "succeeded"
    assert job.worked == [(1, 0), (1, 1), (1, 2), (2, 2), (2, 3)]


def test_a_runner_that_is_killed_is_tried_again_from_its_last_round(make_job: MakeJob, supervise: Supervise) -> None:
    job = make_job({"kill_in_round": 2})
    supervise(job).wait()
    assert (job.row.state, job.row.failures) == ("queued", 1)
    [retry] = job.events("retry")
    assert retry["error"]["code"] == "runner_died" and "SIGKILL" in retry["error"]["message"]
    wait_for(lambda: supervise(job).wait() == 0 and job.row.state == "succeeded")
    assert job.worked == [(1, 0), (1, 1), (1, 2), (2, 2), (2, 3)]


def test_a_runner_that_always_dies_fails_the_job(make_job: MakeJob, supervise: Supervise, settings: Settings) -> None:
    job = make_job({"kill_in_round": 1, "always": True})
    for _ in range(settings.max_failures):
        supervise(job).wait()
        time.sleep(0.1)  # longer than the backoff
    row = job.row
    assert row.state == "failed" and row.error is not None
    assert row.error["code"] == "runner_died" and "out of memory" in row.error["message"]
    assert "so does its child" not in row.error["message"], "stderr is for the worker's log"


def test_a_job_needs_no_disk_of_an_earlier_attempt(
    make_job: MakeJob, supervise: Supervise, monkeypatch: pytest.MonkeyPatch, settings: Settings, tmp_path: Path
) -> None:
    """Another machine goes on: it shares the database and the object store, and no folder."""
    monkeypatch.setenv("SECATEUR_STORAGE_URL", (tmp_path / "shared").as_uri())
    job = make_job({"kill_in_round": 3})
    supervise(job).wait()
    assert job.worked[-1] == (1, 3)
    monkeypatch.setenv("SECATEUR_DATA_DIR", str(tmp_path / "another"))
    time.sleep(0.1)
    supervise(job).wait()
    assert job.row.state == "succeeded"
    assert [row.attempt for row in job.steps] == [1, 1, 1, 2], "each round once"


def test_an_error_a_person_can_act_on_fails_the_job_at_once(make_job: MakeJob, supervise: Supervise) -> None:
    job = make_job({"error_in_round": 1})
    supervise(job).wait()
    assert job.row.state == "failed"
    said = {"code": "weights_not_finite", "message": "The model has NaN weights.", "retryable": False}
    assert job.row.error == {**said, "field": "model_id"}


def test_a_bug_is_tried_again(make_job: MakeJob, supervise: Supervise) -> None:
    job = make_job({"bug_in_round": 1})
    supervise(job).wait()
    assert job.row.state == "queued"
    [retry] = job.events("retry")
    assert retry["error"]["code"] == "internal_error" and "ZeroDivisionError" in retry["error"]["message"]


def test_max_runtime(make_job: MakeJob, supervise: Supervise) -> None:
    job = make_job({"hang_in_round": 0}, max_runtime_seconds=1)
    supervise(job).wait()
    row = job.row
    assert row.state == "failed" and row.error is not None and row.error["code"] == "max_runtime_exceeded"


def test_a_runner_that_says_nothing_is_taken_for_hung(
    make_job: MakeJob, supervise: Supervise, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SECATEUR_STALL_TIMEOUT", "1")
    job = make_job({"hang_in_round": 0})
    supervise(job).wait()
    [retry] = job.events("retry")
    assert retry["error"]["code"] == "runner_stalled"


def test_a_worker_that_dies_while_publishing_publishes_once(
    make_job: MakeJob, supervise: Supervise, settings: Settings
) -> None:
    """Killed between the commit and ``succeeded``: what the next attempt finds is its own, and it adopts it."""
    job = make_job(publish={"repo_id": "org/small", "private": True})
    supervise(job).wait()
    assert job.row.result is not None
    commit = job.row.result["commit_sha"]
    job.sql("state = 'queued', result = NULL, finished_at = NULL")
    supervise(job).wait()
    assert job.row.state == "succeeded" and job.row.result["commit_sha"] == commit
    assert settings.hub_dir is not None
    assert [path.name for path in (settings.hub_dir / "models--org--small" / "snapshots").iterdir()] == [commit]
    assert "model.safetensors" in job.artifacts
