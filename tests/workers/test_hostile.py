"""What a model may do to a child process: the job ends with a reason, and what repeats is not tried for ever."""

from typing import Any

import pytest
from sqlalchemy.orm import Session

from app.fleet import repository as fleet
from app.jobs import leases
from secateur.contract.errors import ErrorCode, PruningError
from tests.workers.conftest import JobHandle, MakeJob, wait_for
from tests.workers.test_supervisor import Supervise

HERE, THERE = {"stage": "scoring", "step": 1}, {"stage": "scoring", "step": 2}


def ends(job: JobHandle, supervise: Supervise) -> dict[str, Any]:
    """Work on the job until it ends, and return its error."""

    def ended() -> bool:
        supervise(job).wait()
        return job.row.state in ("failed", "succeeded")

    wait_for(ended)
    row = job.row
    assert row.state == "failed" and row.error is not None
    return row.error


def test_a_crash_at_the_same_place_is_not_tried_a_third_time(make_job: MakeJob, supervise: Supervise) -> None:
    job = make_job({"crash_in_round": 2})
    error = ends(job, supervise)
    assert error["code"] == "runner_died" and not error["retryable"]
    assert "SIGSEGV" in error["message"] and "twice at the same place" in error["message"]
    assert job.row.attempt == 2
    [retry] = job.events("retry")
    assert retry["place"] == {"stage": "scoring", "step": 2}


def test_a_stall_at_the_same_place_is_not_tried_a_third_time(
    make_job: MakeJob, supervise: Supervise, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SECATEUR_STALL_TIMEOUT", "10")  # the runner starts in less on a busy machine, too
    job = make_job({"stall_in_round": 0})
    assert ends(job, supervise)["code"] == "runner_stalled"
    assert job.row.attempt == 2


def test_a_bug_at_the_same_place_is_not_tried_a_third_time(make_job: MakeJob, supervise: Supervise) -> None:
    job = make_job({"bug_in_round": 1})
    assert ends(job, supervise)["code"] == "internal_error"
    assert job.row.attempt == 2


Failure = tuple[ErrorCode, dict[str, Any] | None]
DIED, STALLED, AWAY = ErrorCode.RUNNER_DIED, ErrorCode.RUNNER_STALLED, ErrorCode.HUB_UNAVAILABLE


@pytest.mark.parametrize(
    ("failures", "attempts"),
    [
        ([(DIED, HERE), (DIED, HERE)], 2),
        ([(DIED, HERE), (DIED, THERE), (DIED, THERE)], 3),
        ([(DIED, HERE), (STALLED, HERE), (DIED, HERE), (DIED, HERE)], 4),
        ([(AWAY, HERE)] * 5, 5),
        ([(DIED, None)] * 5, 5),
    ],
)
def test_what_counts_as_the_same_failure(
    failures: list[Failure], attempts: int, session: Session, make_job: MakeJob
) -> None:
    job = make_job()
    made = 0
    for code, place in failures:
        claim = leases.claim(session, job.id, "test", 600)
        assert claim is not None
        made += 1
        error = PruningError(code, "It failed.").as_dict()
        if leases.fail(session, job.id, claim.attempt, error, leases.Patience(5, 5, 0, 0, 60), place) == "failed":
            break
    assert (made, job.row.state) == (attempts, "failed")


def test_a_step_in_between_is_progress(session: Session, make_job: MakeJob) -> None:
    job = make_job()
    error = PruningError(DIED, "It failed.").as_dict()
    for number in range(1, 5):
        claim = leases.claim(session, job.id, "test", 600)
        assert claim is not None
        leases.record_step(session, job.id, claim.attempt, number, {}, {})
        assert leases.fail(session, job.id, claim.attempt, error, leases.Patience(3, 3, 0, 0, 60), HERE) == "queued"


@pytest.mark.parametrize("in_a_child", [False, True])
def test_a_child_that_takes_too_much_memory(
    in_a_child: bool, make_job: MakeJob, supervise: Supervise, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SECATEUR_MAX_CHILD_MEMORY_BYTES", str(2**30))
    job = make_job({"grow_in_round": 1, "in_a_child": in_a_child})
    error = ends(job, supervise)
    assert error["code"] == "out_of_memory" and "1,073,741,824" in error["message"]
    assert job.row.attempt == 1


def test_a_job_that_is_too_large_moves_to_a_larger_worker(
    session: Session, make_job: MakeJob, supervise: Supervise, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SECATEUR_MAX_CHILD_MEMORY_BYTES", str(2**30))
    monkeypatch.setenv("SECATEUR_HEARTBEAT_INTERVAL", "100")  # the larger worker sends no heartbeat but its first
    fleet.beat(session, "test", "worker", {"memory_bytes": 2**30})
    fleet.beat(session, "large", "worker", {"memory_bytes": 2**31})
    job = make_job({"grow_in_round": 1})
    supervise(job)
    wait_for(lambda: job.events("retry"))
    assert (job.row.state, job.row.failures, job.row.outgrown_memory_bytes) == ("queued", 0, 2**30)
    error = job.row.last_error
    assert error is not None and error["code"] == "out_of_memory"
    assert error["message"].endswith("The worker has 1.0 GiB of memory; the job moves to a worker with more.")
    assert leases.claim_next(session, "test", 600, None) is None
    fleet.beat(session, "test", "worker", {"memory_bytes": 2**31})
    supervise(job)
    job.wait_for_state("succeeded")
    assert job.worked[-1][0] == 2 and (2, 0) not in job.worked, "it continues from its last step"


@pytest.mark.parametrize("how", ["one file", "many files"])
def test_a_child_that_fills_the_disk(
    how: str, make_job: MakeJob, supervise: Supervise, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SECATEUR_MAX_JOB_DISK_BYTES", str(2**25))
    job = make_job({"fill_in_round": 1, "fill_in_round_with": how})
    error = ends(job, supervise)
    assert error["code"] == "disk_limit_exceeded" and "33,554,432" in error["message"]
    assert job.row.attempt == 1
