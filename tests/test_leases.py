"""Leases between real, concurrent sessions."""

import datetime as dt
import threading
import uuid
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import pytest
from sqlalchemy import func, select, text, update
from sqlalchemy.exc import OperationalError
from sqlalchemy.orm import Session, sessionmaker

from app.auth import repository as keys
from app.auth import service as auth
from app.config import Settings
from app.db.session import session_factory
from app.fleet import repository as fleet
from app.fleet.models import Worker
from app.jobs import leases, transitions
from app.jobs.leases import LeaseLost
from app.jobs.models import Job, JobEvent, JobStep
from app.jobs.routing import Required, waiting_for
from app.jobs.transitions import TransitionRefused, Trigger
from secateur.contract.states import State
from secateur.contract.workers import Drain
from tests.patience import PATIENCE

TTL = 60.0
LIMITS = leases.Patience(max_failures=3, max_losses=10, publish=3600, backoff=0, worker_silence=600)
FILE = {"name": "a", "key": "jobs/x/artifacts/1/a", "size": 1, "sha256": "00"}
ONCE = leases.Patience(max_failures=1, max_losses=1, publish=0, backoff=0, worker_silence=600)
LOST = {"code": "x", "message": "x", "retryable": True}
TOO_LARGE = {"code": "out_of_memory", "message": "m", "retryable": False}
GIB = 2**30


@pytest.fixture
def sessions(settings: Settings) -> sessionmaker[Session]:
    return session_factory()


@pytest.fixture
def queued(session: Session) -> uuid.UUID:
    owner, _ = auth.create(session, "owner")
    job = Job(owner_id=owner.id, request={"rounds": 2}, model_id="m", method="piem")
    session.add(job)
    session.commit()
    return job.id


def _job(session: Session, job_id: uuid.UUID) -> Job:
    session.rollback()
    return session.get_one(Job, job_id, populate_existing=True)


def _expire(session: Session, job_id: uuid.UUID) -> None:
    session.execute(update(Job).where(Job.id == job_id).values(lease_expires_at=func.now() - dt.timedelta(seconds=1)))
    session.commit()


def _at_once(sessions: sessionmaker[Session], *calls: Callable[[Session], Any]) -> list[Any]:
    """The results, or the exceptions, of calls that start together, each in a session of its own."""
    barrier = threading.Barrier(len(calls))

    def run(call: Callable[[Session], Any]) -> Any:
        with sessions() as session:
            barrier.wait(PATIENCE)
            try:
                return call(session)
            except (LeaseLost, TransitionRefused) as error:
                return error

    with ThreadPoolExecutor(len(calls)) as pool:
        return list(pool.map(run, calls))


def test_one_of_many_claimers_wins(sessions: sessionmaker[Session], session: Session, queued: uuid.UUID) -> None:
    claims = _at_once(sessions, *([lambda s: leases.claim(s, queued, "w", TTL)] * 8))
    [claim] = [claim for claim in claims if claim is not None]
    assert (claim.job_id, claim.attempt, claim.request) == (queued, 1, {"rounds": 2})
    job = _job(session, queued)
    assert (job.state, job.attempt, job.worker) == (State.RUNNING, 1, "w")
    assert job.started_at is not None


def test_a_job_ends_while_its_key_is_locked(
    sessions: sessionmaker[Session], session: Session, queued: uuid.UUID
) -> None:
    """A submission locks the key and then counts usage; whatever ends a job counts usage and then refers to the key."""
    assert leases.claim(session, queued, "w", TTL) is not None
    leases.move(session, queued, 1, Trigger.PUBLISH)
    with sessions() as submitting:
        assert keys.lock(submitting, _job(session, queued).owner_id) is not None
        session.execute(text("SET LOCAL lock_timeout = '5s'"))
        leases.move(session, queued, 1, Trigger.SUCCEED, result={})
        owner_id = _job(session, queued).owner_id
        with sessions() as other:
            other.execute(text("SET LOCAL lock_timeout = '100ms'"))
            with pytest.raises(OperationalError, match="lock timeout"):
                keys.lock(other, owner_id)
    assert _job(session, queued).state == State.SUCCEEDED


def test_what_cannot_be_claimed(session: Session, queued: uuid.UUID) -> None:
    assert leases.claim(session, uuid.uuid4(), "w", TTL) is None
    session.execute(update(Job).values(not_before=func.now() + dt.timedelta(hours=1)))
    session.commit()
    assert leases.claim(session, queued, "w", TTL) is None
    session.execute(update(Job).values(not_before=func.now() - dt.timedelta(seconds=1)))
    session.commit()
    assert leases.claim(session, queued, "w", TTL) is not None
    assert leases.claim(session, queued, "w", TTL) is None


def _writes(session: Session, job_id: uuid.UUID, attempt: int) -> list[Callable[[], Any]]:
    return [
        lambda: leases.renew(session, job_id, attempt, TTL),
        lambda: leases.report_progress(session, job_id, attempt, {"share": 0.5}),
        lambda: leases.report_progress(session, job_id, attempt, {}, {"type": "warning", "data": {"message": "m"}}),
        lambda: leases.record_step(session, job_id, attempt, 1, {}, {}),
        lambda: leases.move(session, job_id, attempt, Trigger.PUBLISH),
        lambda: leases.release(session, job_id, attempt),
        lambda: leases.fail(session, job_id, attempt, LOST, LIMITS),
    ]


@pytest.mark.parametrize("index", range(7))
def test_an_expired_lease_writes_nothing(session: Session, queued: uuid.UUID, index: int) -> None:
    leases.claim(session, queued, "w", TTL)
    _expire(session, queued)
    with pytest.raises(LeaseLost):
        _writes(session, queued, 1)[index]()
    job = _job(session, queued)
    assert (job.state, job.version, job.progress, job.failures) == (State.RUNNING, 2, None, 0)
    assert session.scalar(select(func.count()).select_from(JobStep)) == 0


@pytest.mark.parametrize("index", range(7))
def test_an_earlier_attempt_writes_nothing(session: Session, queued: uuid.UUID, index: int) -> None:
    leases.claim(session, queued, "w", TTL)
    leases.release(session, queued, 1)
    claim = leases.claim(session, queued, "w2", TTL)
    assert claim is not None and claim.attempt == 2
    before = _job(session, queued).version
    with pytest.raises(LeaseLost):
        _writes(session, queued, 1)[index]()
    job = _job(session, queued)
    assert (job.state, job.version, job.worker) == (State.RUNNING, before, "w2")


def test_the_owner_writes(session: Session, queued: uuid.UUID) -> None:
    leases.claim(session, queued, "w", TTL)
    soon = _job(session, queued).lease_expires_at
    assert leases.renew(session, queued, 1, 600) == leases.Beat(cancel=False, pause=False)
    later = _job(session, queued).lease_expires_at
    assert soon is not None and later is not None and (later - soon).total_seconds() > 500
    leases.report_progress(session, queued, 1, {"share": 0.5})
    for ratio in (0.1, 0.2, 0.2):
        leases.record_step(session, queued, 1, 1, {"ratio": ratio}, {"ratio": ratio})
    assert leases.newest_state(session, queued, 1) == {"ratio": 0.2}
    for _ in range(2):
        leases.record_export(session, queued, 1, {"b": 2}, [FILE])
    assert leases.exported(session, queued, 1) == ({"b": 2}, [FILE])
    assert leases.succeed(session, queued, 1, {"a": 1}, {"share": 1.0}) == State.SUCCEEDED
    job = _job(session, queued)
    assert (job.progress, job.result, job.report) == ({"share": 1.0}, {"a": 1}, {"b": 2})
    assert job.lease_expires_at is None and job.finished_at is not None
    [row] = session.scalars(select(JobStep))
    assert (row.state, row.data) == (None, {"ratio": 0.2})
    types = [event.type for event in session.scalars(select(JobEvent).order_by(JobEvent.id))]
    assert types == ["state", "step", "step", "state", "state"]
    with pytest.raises(LeaseLost):
        leases.renew(session, queued, 1, TTL)


def test_a_beat_brings_requests(session: Session, queued: uuid.UUID) -> None:
    leases.claim(session, queued, "w", TTL)
    job = transitions.lock(session, queued)
    assert job is not None
    transitions.apply(session, job, Trigger.PAUSE)
    session.commit()
    assert leases.renew(session, queued, 1, TTL) == leases.Beat(cancel=False, pause=True)
    transitions.apply(session, job, Trigger.CANCEL)
    session.commit()
    assert leases.renew(session, queued, 1, TTL) == leases.Beat(cancel=True, pause=False)
    with pytest.raises(TransitionRefused):
        leases.move(session, queued, 1, Trigger.PUBLISH)
    assert leases.move(session, queued, 1, Trigger.STOPPED) == State.CANCELLED


@pytest.mark.parametrize(("asked", "state"), [(True, State.PAUSED), (False, State.QUEUED)])
def test_stepping_aside(session: Session, queued: uuid.UUID, asked: bool, state: State) -> None:
    leases.claim(session, queued, "w", TTL)
    session.execute(update(Job).values(pause_requested=asked))
    session.commit()
    assert leases.release(session, queued, 1) == state
    assert _job(session, queued).failures == 0


def test_failures_are_counted_and_end(session: Session, queued: uuid.UUID) -> None:
    for attempt in (1, 2):
        leases.claim(session, queued, "w", TTL)
        assert leases.fail(session, queued, attempt, LOST, LIMITS) == State.QUEUED
    leases.claim(session, queued, "w", TTL)
    assert leases.fail(session, queued, 3, LOST, LIMITS) == State.FAILED
    job = _job(session, queued)
    assert (job.failures, job.error) == (3, LOST)


def test_a_round_clears_the_count_of_failures_and_is_recorded_once(session: Session, queued: uuid.UUID) -> None:
    for attempt in (1, 2):
        leases.claim(session, queued, "w", TTL)
        leases.fail(session, queued, attempt, LOST, LIMITS)
    leases.claim(session, queued, "w", TTL)
    leases.record_step(session, queued, 3, 0, {}, {})
    assert _job(session, queued).failures == 2, "measuring the unpruned model is no progress"
    for _ in range(2):
        leases.record_step(session, queued, 3, 1, {}, {})
    assert _job(session, queued).failures == 0
    events = session.scalars(select(JobEvent).where(JobEvent.type == "step")).all()
    assert [event.data["number"] for event in events] == [0, 1]


def test_backoff_doubles(session: Session, queued: uuid.UUID) -> None:
    waits = []
    for attempt in (1, 2, 3):
        leases.claim(session, queued, "w", TTL)
        leases.fail(session, queued, attempt, LOST, replace(LIMITS, max_failures=9, backoff=100))
        waits.append(session.scalar(select(func.extract("epoch", Job.not_before - func.now()))))
        session.execute(update(Job).values(not_before=None))
        session.commit()
    assert [round(float(wait), -2) for wait in waits if wait is not None] == [100, 200, 400]


def test_lost_workers_use_up_no_failures(session: Session, queued: uuid.UUID) -> None:
    for attempt in range(1, LIMITS.max_losses):
        leases.claim(session, queued, "w", TTL)
        _expire(session, queued)
        leases.reap(session, LIMITS)
        job = _job(session, queued)
        assert (job.state, job.failures, job.losses) == (State.QUEUED, 0, attempt)
        assert job.last_error is not None and job.last_error["code"] == "worker_lost"
    leases.claim(session, queued, "w", TTL)
    leases.record_step(session, queued, LIMITS.max_losses, 1, {}, {})
    assert _job(session, queued).losses == 0, "a completed step begins a new budget"


def test_a_hub_that_does_not_answer_has_a_budget_of_its_own(session: Session, queued: uuid.UUID) -> None:
    away = {"code": "hub_unavailable", "message": "m", "retryable": True}
    leases.claim(session, queued, "w", TTL)
    leases.record_export(session, queued, 1, {}, [FILE])
    for attempt in range(1, 9):
        assert leases.fail(session, queued, attempt, away, LIMITS) == State.QUEUED
        job = _job(session, queued)
        assert (job.failures, job.last_error, job.error) == (0, away, None)
        session.execute(update(Job).values(not_before=None))
        claim = leases.claim(session, queued, "w", TTL)
        assert claim is not None and claim.exported
        assert _job(session, queued).last_error is None
    session.execute(update(Job).values(waiting_since=func.now() - dt.timedelta(seconds=LIMITS.publish + 1)))
    session.commit()
    assert leases.fail(session, queued, 9, away, LIMITS) == State.FAILED
    assert _job(session, queued).error == away


def test_a_hub_that_does_not_answer_before_the_export_counts_as_a_failure(session: Session, queued: uuid.UUID) -> None:
    leases.claim(session, queued, "w", TTL)
    leases.fail(session, queued, 1, {"code": "hub_unavailable", "message": "m", "retryable": True}, LIMITS)
    assert _job(session, queued).failures == 1


def test_what_is_not_retryable_fails_at_once(session: Session, queued: uuid.UUID) -> None:
    leases.claim(session, queued, "w", TTL)
    assert leases.fail(session, queued, 1, {**LOST, "retryable": False}, LIMITS) == State.FAILED


def _beat(session: Session, **memories: int | None) -> None:
    for name, memory in memories.items():
        fleet.beat(session, name, "worker", {} if memory is None else {"memory_bytes": memory})


def _take(session: Session, worker: str) -> int | None:
    """The number of the attempt that the worker begins, or ``None`` if it may take no job."""
    claim = leases.claim_next(session, worker, TTL, None)
    return None if claim is None else claim.attempt


def test_what_does_not_fit_moves_to_ever_larger_workers(session: Session, queued: uuid.UUID) -> None:
    _beat(session, a=GIB, b=GIB, c=2 * GIB, d=3 * GIB, unknown=None)
    for attempt, (worker, smaller) in enumerate({"a": "a b", "c": "a b c"}.items(), 1):
        assert _take(session, worker) == attempt
        assert leases.fail(session, queued, attempt, TOO_LARGE, ONCE) == State.QUEUED
        job = _job(session, queued)
        assert (job.failures, job.losses, job.worker) == (0, 0, None)
        assert job.last_error is not None
        assert (
            job.last_error["message"]
            == f"m The worker has {attempt}.0 GiB of memory; the job moves to a worker with more."
        )
        assert [_take(session, name) for name in (*smaller.split(), "unknown")] == [None] * (attempt + 2)
    assert _take(session, "d") == 3
    assert leases.fail(session, queued, 3, TOO_LARGE, LIMITS) == State.FAILED
    job = _job(session, queued)
    assert job.error is not None and job.error["code"] == TOO_LARGE["code"]
    assert job.error["message"] == "m The worker has 3.0 GiB of memory; no larger worker that can hold the job is live."
    transitions.apply(session, job, Trigger.RETRY)
    session.commit()
    assert [_take(session, name) for name in ("a", "d", "unknown")] == [None] * 3, "a retry repeats no failure"
    assert waiting_for(Required.of(job), fleet.offers(session, 600)) == (
        "a worker with more than 3.0 GiB of memory; the live workers offer: 1.0 GiB, 2.0 GiB, 3.0 GiB, memory that is not known"
    )
    _beat(session, e=4 * GIB)
    assert _take(session, "e") == 4


@pytest.mark.parametrize("why", ["drained", "silent", "without the labels", "memory is not known"])
def test_a_larger_worker_that_cannot_take_the_job_does_not_count(session: Session, queued: uuid.UUID, why: str) -> None:
    _beat(session, a=GIB, b=None if why == "memory is not known" else 2 * GIB)
    if why == "drained":
        fleet.set_drain(session, "b", Drain.FINISH)
    if why == "silent":
        session.execute(
            update(Worker).where(Worker.name == "b").values(last_seen_at=func.now() - dt.timedelta(hours=1))
        )
    if why == "without the labels":
        fleet.beat(session, "a", "worker", {"memory_bytes": GIB, "labels": {"gpu": "x"}})
        session.execute(update(Job).values(required_labels={"gpu": "x"}))
    session.commit()
    assert _take(session, "a") == 1
    assert leases.fail(session, queued, 1, TOO_LARGE, LIMITS) == State.FAILED
    error = _job(session, queued).error
    assert error is not None and "1.0 GiB" in error["message"] and "no larger worker" in error["message"]


def test_a_worker_whose_memory_is_not_known_leaves_nothing_to_compare(session: Session, queued: uuid.UUID) -> None:
    _beat(session, a=None, b=GIB)
    assert _take(session, "a") == 1
    assert leases.fail(session, queued, 1, TOO_LARGE, LIMITS) == State.FAILED
    job = _job(session, queued)
    assert (job.error, job.outgrown_memory_bytes) == (TOO_LARGE, None)


def test_a_cancelled_job_moves_nowhere(session: Session, queued: uuid.UUID) -> None:
    _beat(session, a=GIB, b=2 * GIB)
    assert _take(session, "a") == 1
    transitions.apply(session, _job(session, queued), Trigger.CANCEL)
    session.commit()
    assert leases.fail(session, queued, 1, TOO_LARGE, LIMITS) == State.CANCELLED


def test_reaping(session: Session, queued: uuid.UUID) -> None:
    leases.claim(session, queued, "w", TTL)
    assert leases.reap(session, replace(LIMITS, max_losses=2)) == []
    _expire(session, queued)
    assert leases.reap(session, replace(LIMITS, max_losses=2)) == [queued]
    assert _job(session, queued).state == State.QUEUED
    leases.claim(session, queued, "w", TTL)
    _expire(session, queued)
    assert leases.reap(session, replace(LIMITS, max_losses=2)) == [queued]
    job = _job(session, queued)
    assert job.state == State.FAILED and job.error is not None and job.error["code"] == "worker_lost"


def test_a_cancelling_job_whose_worker_died_is_cancelled(session: Session, queued: uuid.UUID) -> None:
    leases.claim(session, queued, "w", TTL)
    job = transitions.lock(session, queued)
    assert job is not None
    transitions.apply(session, job, Trigger.CANCEL)
    session.commit()
    _expire(session, queued)
    assert leases.reap(session, replace(LIMITS, max_losses=1)) == [queued]
    assert _job(session, queued).state == State.CANCELLED


def test_reapers_at_once_count_one_failure(
    sessions: sessionmaker[Session], session: Session, queued: uuid.UUID
) -> None:
    leases.claim(session, queued, "w", TTL)
    _expire(session, queued)
    reaped = _at_once(sessions, *([lambda s: leases.reap(s, LIMITS)] * 6))
    assert sum(reaped, []) == [queued]
    assert (_job(session, queued).failures, _job(session, queued).losses) == (0, 1)


def test_reap_and_renew_agree(sessions: sessionmaker[Session], session: Session, queued: uuid.UUID) -> None:
    """At the very end of a lease either the owner keeps the job or the reaper takes it: never both, never neither."""
    kept = 0
    for attempt in range(1, 13):
        claim = leases.claim(session, queued, "w", 0.02)
        assert claim is not None
        renewed, reaped = _at_once(
            sessions,
            lambda s, attempt=attempt: leases.renew(s, queued, attempt, TTL),  # type: ignore[misc]
            lambda s: leases.reap(s, replace(LIMITS, max_losses=99)),
        )
        state = _job(session, queued).state
        if isinstance(renewed, LeaseLost):
            assert reaped == [queued] or leases.reap(session, replace(LIMITS, max_losses=99)) == [queued]
        else:
            kept += 1
            assert reaped == [] and state == State.RUNNING
            leases.release(session, queued, attempt)


def test_a_renewal_that_waited_for_the_reaper_is_lost(
    sessions: sessionmaker[Session], session: Session, queued: uuid.UUID
) -> None:
    leases.claim(session, queued, "w", TTL)
    _expire(session, queued)
    session.scalars(select(Job).where(Job.id == queued).with_for_update()).one()
    with sessions() as other, ThreadPoolExecutor(1) as pool:
        renewal = pool.submit(leases.renew, other, queued, 1, TTL)
        leases.reap(session, LIMITS)
        with pytest.raises(LeaseLost):
            renewal.result(timeout=PATIENCE)
