"""The fair order of the queue: against a plain model of it, between workers at once, and with workers that differ."""

import datetime as dt
import itertools
import random
import uuid
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
from sqlalchemy import Engine, create_engine, delete, event, func, make_url, select, text, update
from sqlalchemy.orm import Session, sessionmaker

from app.auth import service as auth
from app.auth.models import ApiKey
from app.config import Settings
from app.db.session import session_factory
from app.fleet import repository as fleet
from app.fleet import service as workers
from app.fleet.models import Worker
from app.fleet.repository import Offer
from app.jobs import attempts, fair_queue, leases, repository, transitions
from app.jobs.leases import Claim
from app.jobs.models import Attempt, Job
from app.jobs.routing import Required, waiting_for
from app.jobs.transitions import Trigger
from secateur.contract.states import State
from secateur.contract.workers import Drain
from tests.test_leases import LOST, ONCE, TTL, _at_once, _expire

GIB = 2**30
MEMORIES = (None, 10, 20, 30)
LABELS: tuple[dict[str, str], ...] = ({}, {"gpu": "a"}, {"gpu": "b"}, {"gpu": "a", "zone": "z"})
DAY = 86_400


def add_job(session: Session, owner_id: uuid.UUID, **values: Any) -> Job:
    job = Job(owner_id=owner_id, request={}, model_id="m", method="piem", **values)
    session.add(job)
    session.flush()
    return job


@dataclass
class Key:
    """What the model of the order knows of an API key."""

    running: int
    seconds: float
    jobs: list[Job] = field(default_factory=list)


def expected(keys: list[Key], offer: Offer, most: int | None) -> list[uuid.UUID]:
    """The next job of each key in the fair order, by plain sorting."""
    heads = []
    for key in keys:
        held = [
            job
            for job in key.jobs
            if (job.not_before is None or job.not_before < dt.datetime.now(dt.UTC)) and Required.of(job).holds(offer)
        ]
        if held and (most is None or key.running < most):
            head = min(held, key=lambda job: (-job.priority, job.id))
            heads.append((key.running, key.seconds, head.id))
    return [job_id for _, _, job_id in sorted(heads)]


@pytest.fixture(scope="module")
def shared(template_database: str, postgres: Any) -> Iterator[Engine]:
    """One database for all states: each state begins with empty tables."""
    admin = create_engine(make_url(postgres.url).set(database="postgres"), isolation_level="AUTOCOMMIT")
    with admin.connect() as connection:
        connection.exec_driver_sql(f"CREATE DATABASE fair TEMPLATE {template_database}")
        engine = create_engine(make_url(postgres.url).set(database="fair"))
        yield engine
        engine.dispose()
        connection.exec_driver_sql("DROP DATABASE fair")
    admin.dispose()


@pytest.mark.parametrize("seed", range(60))
def test_the_order_is_that_of_the_model(shared: Engine, seed: int) -> None:
    dice = random.Random(seed)
    now = dt.datetime.now(dt.UTC)
    with Session(shared, expire_on_commit=False) as session:
        for table in (Attempt, Job, ApiKey):
            session.execute(delete(table))
        keys = []
        for name in range(dice.randint(1, 7)):
            owner, _ = auth.create(session, f"key {name}")
            key = Key(running=dice.randint(0, 2), seconds=0)
            keys.append(key)
            for _ in range(key.running):
                state = dice.choice(transitions.LIVE)
                add_job(session, owner.id, state=state, worker="w", lease_expires_at=now + dt.timedelta(hours=1))
            # Ages in hours: before the window, across its begin, within it. Whole hours make ties; what crosses the begin
            # of the window shrinks while the test runs, and its half hour keeps it from a tie.
            for began, ended in dice.sample([(40, 30), (26, 21.5), (10, 9), (3, 2), (2, 1)], dice.randint(0, 3)):
                times = {
                    "started_at": now - dt.timedelta(hours=began),
                    "ended_at": now - dt.timedelta(hours=ended),
                }
                session.add(Attempt(job_id=uuid.uuid4(), attempt=1, owner_id=owner.id, worker="w", **times))
                key.seconds += 3600 * max(0, min(began, 24) - ended)
            for _ in range(dice.randint(0, 5)):
                add_job(session, owner.id, state=dice.choice((State.PAUSED, State.FAILED, State.CANCELLED)))
                values: dict[str, Any] = {
                    "priority": dice.randint(-1, 1),
                    "required_labels": dice.choice(LABELS),
                    "required_memory_bytes": dice.choice(MEMORIES),
                    "outgrown_memory_bytes": dice.choice((None, *MEMORIES)),
                    "not_before": dice.choice((None, None, now - dt.timedelta(hours=1), now + dt.timedelta(hours=1))),
                }
                key.jobs.append(add_job(session, owner.id, **values))
        session.commit()
        for memory, labels, most in itertools.product(MEMORIES, LABELS, (None, 1, 2)):
            offer = Offer(labels, memory, "cpu")
            wanted = expected(keys, offer, most)
            found = session.scalars(fair_queue.order(offer, ()), {"max_running": most}).all()
            assert list(found) == wanted, (offer, most)
            assert fair_queue.first(session, offer, most) == (wanted[0] if wanted else None)
        unheld = [Offer(labels, memory, "cpu") for memory, labels in zip(MEMORIES, LABELS, strict=True)]
        jobs = [job for key in keys for job in key.jobs]
        unheld = unheld[: dice.randint(0, 4)]
        assert repository.count_unheld(session, unheld) == sum(
            waiting_for(Required.of(job), unheld) is not None for job in jobs
        )


@pytest.fixture
def sessions(settings: Settings) -> sessionmaker[Session]:
    return session_factory()


@pytest.fixture
def owners(session: Session) -> list[uuid.UUID]:
    return [auth.create(session, name)[0].id for name in ("a", "b", "c")]


def claim(session: Session, worker: str = "w", most: int | None = None) -> Claim | None:
    return leases.claim_next(session, worker, TTL, most)


def test_a_second_key_is_next_however_many_jobs_the_first_has(session: Session, owners: list[uuid.UUID]) -> None:
    first, second, _ = owners
    fleet.beat(session, "w", "worker", {})
    many = [add_job(session, first).id for _ in range(20)]
    session.commit()
    assert (found := claim(session)) and found.job_id == many[0]
    late = add_job(session, second).id
    session.commit()
    assert (found := claim(session)) and found.job_id == late
    for job_id in (many[0], late):
        leases.fail(session, job_id, 1, {**LOST, "retryable": False}, ONCE)
    session.execute(update(Attempt).where(Attempt.job_id == late).values(started_at=func.now() - dt.timedelta(hours=1)))
    another = add_job(session, second).id
    session.commit()
    assert (found := claim(session)) and found.job_id == many[1], "the second key has used more time"
    assert (found := claim(session)) and found.job_id == another, "the second key has no job at work"


def test_claims_at_once_are_fair_and_keep_the_limit(
    sessions: sessionmaker[Session], session: Session, owners: list[uuid.UUID]
) -> None:
    for index, owner_id in enumerate(owners):
        for _ in range(8 - 3 * index):
            add_job(session, owner_id)
    for number in range(9):
        fleet.beat(session, f"w{number}", "worker", {})
    session.commit()
    claims = _at_once(sessions, *[lambda s, n=n: claim(s, f"w{n}", 3) for n in range(9)])
    taken = [found.job_id for found in claims if found is not None]
    assert len(taken) == len(set(taken)) == 8, "three of each key, and the third key has two"
    owned = session.scalars(select(Job.owner_id).where(Job.id.in_(taken))).all()
    assert Counter(owned) == dict(zip(owners, (3, 3, 2), strict=True))


def test_a_job_that_someone_changes_is_passed_over(
    sessions: sessionmaker[Session], session: Session, owners: list[uuid.UUID]
) -> None:
    fleet.beat(session, "w", "worker", {})
    jobs = [add_job(session, owners[0]).id for _ in range(2)]
    session.commit()
    assert transitions.lock(session, jobs[0]) is not None
    with sessions() as other:
        assert (found := claim(other)) and found.job_id == jobs[1]
        assert claim(other) is None
        session.rollback()
        assert (found := claim(other)) and found.job_id == jobs[0]


def test_a_job_goes_to_a_worker_that_can_hold_it(session: Session, owners: list[uuid.UUID]) -> None:
    large = add_job(session, owners[0], required_memory_bytes=80 * GIB, required_labels={"gpu": "h100"}, priority=9).id
    small = add_job(session, owners[0], required_memory_bytes=GIB).id
    session.commit()
    assert claim(session) is None, "a worker that sent no heartbeat"
    fleet.beat(session, "small", "worker", {"memory_bytes": 8 * GIB, "labels": {"gpu": "h100"}})
    fleet.beat(session, "large", "worker", {"memory_bytes": 80 * GIB, "labels": {"gpu": "h100", "zone": "a"}})
    assert (found := claim(session, "small")) and found.job_id == small
    assert claim(session, "small") is None
    assert (found := claim(session, "large")) and found.job_id == large


def test_a_drained_worker_takes_no_job_and_may_release_its_own(session: Session, owners: list[uuid.UUID]) -> None:
    for name in ("w", "v"):
        fleet.beat(session, name, "worker", {})
    job_id = add_job(session, owners[0]).id
    session.commit()
    workers.set_drain(session, "w", Drain.FINISH)
    assert claim(session) is None
    fleet.beat(session, "w", "worker", {})
    assert claim(session) is None, "a heartbeat does not end the drain"
    workers.set_drain(session, "w", None)
    assert claim(session) is not None
    workers.set_drain(session, "w", Drain.FINISH)
    assert leases.renew(session, job_id, 1, TTL) == leases.Beat(cancel=False, pause=False)
    workers.set_drain(session, "w", Drain.RELEASE)
    assert leases.renew(session, job_id, 1, TTL) == leases.Beat(cancel=False, pause=True)
    assert leases.record_step(session, job_id, 1, 1, {}, {}).pause
    assert leases.release(session, job_id, 1) == State.QUEUED, "not paused: no user asked for it"
    assert (found := claim(session, "v")) and found.job_id == job_id
    for name in ("x", ""):
        with pytest.raises(workers.UnknownWorker):
            workers.set_drain(session, name, Drain.FINISH)
    assert session.scalar(select(func.count()).select_from(Worker)) == 2


@pytest.mark.parametrize(
    ("end", "outcome", "code"),
    [
        ("succeed", "succeeded", None),
        ("fail", "failed", "x"),
        ("retry", "failed", "x"),
        ("lost", "failed", "worker_lost"),
        ("release", "released", None),
        ("pause", "paused", None),
        ("cancel", "cancelled", None),
        ("cancel and lost", "cancelled", "worker_lost"),
    ],
)
def test_every_end_of_an_attempt_is_recorded(
    session: Session, owners: list[uuid.UUID], end: str, outcome: str, code: str | None
) -> None:
    fleet.beat(session, "w", "worker", {})
    job = add_job(session, owners[0])
    session.commit()
    assert claim(session) is not None
    [open_row] = session.scalars(select(Attempt))
    assert (open_row.owner_id, open_row.worker, open_row.ended_at, open_row.outcome) == (owners[0], "w", None, None)
    if "cancel" in end or end == "pause":
        transitions.apply(session, job, Trigger.PAUSE if end == "pause" else Trigger.CANCEL)
        session.commit()
    if end == "succeed":
        leases.move(session, job.id, 1, Trigger.PUBLISH)
        leases.move(session, job.id, 1, Trigger.SUCCEED, result={}, report={})
    elif end in ("fail", "retry"):
        leases.fail(session, job.id, 1, {**LOST, "retryable": end == "retry"}, ONCE)
    elif end == "cancel":
        leases.move(session, job.id, 1, Trigger.STOPPED)
    elif "lost" in end:
        _expire(session, job.id)
        assert leases.reap(session, ONCE) == [job.id]
    else:
        leases.release(session, job.id, 1)
    session.expire_all()
    [row] = session.scalars(select(Attempt))
    assert (row.outcome, row.error_code) == (outcome, code) and row.ended_at is not None
    session.refresh(job)
    if job.state in transitions.TERMINAL:
        repository.delete(session, job)
        session.commit()
        assert session.scalar(select(func.count()).select_from(Attempt)) == 1, "it outlives the job"


def test_worker_time_by_key_is_a_plain_query(session: Session, owners: list[uuid.UUID]) -> None:
    day = dt.datetime(2026, 1, 1, 12, tzinfo=dt.UTC)
    for owner_id, seconds in ((owners[0], 10), (owners[0], 5), (owners[1], 7)):
        times = {"started_at": day, "ended_at": day + dt.timedelta(seconds=seconds)}
        session.add(Attempt(job_id=uuid.uuid4(), attempt=1, owner_id=owner_id, worker="w", **times))
    query = select(Attempt.owner_id, func.sum(attempts.SECONDS)).group_by(Attempt.owner_id)
    assert dict(session.execute(query).all()) == {owners[0]: 15, owners[1]: 7}


def test_a_claim_reads_one_row_of_the_queue_for_each_key(session: Session, owners: list[uuid.UUID]) -> None:
    for owner_id in owners:
        session.execute(
            text(
                "INSERT INTO jobs (id, owner_id, state, version, request, model_id, method, labels, attempt, failures,"
                " losses, pause_requested, may_be_published, expired) SELECT gen_random_uuid(), :owner, 'queued', 1, '{}', 'm', 'flap',"
                " '{}', 0, 0, 0, false, false, false FROM generate_series(1, 3000)"
            ),
            {"owner": owner_id},
        )
    session.commit()
    session.connection(execution_options={"isolation_level": "AUTOCOMMIT"}).execute(text("ANALYZE"))
    plans: list[dict[str, Any]] = []

    def explain(connection: Any, cursor: Any, statement: str, parameters: Any, *_: object) -> None:
        with cursor.connection.cursor() as other:
            [[[found]]] = other.execute(f"EXPLAIN (ANALYZE, FORMAT JSON) {statement}", parameters).fetchall()
            plans.append(found["Plan"])

    event.listen(session.get_bind(), "before_cursor_execute", explain)
    assert fair_queue.first(session, Offer({"gpu": "a"}, GIB, "cuda"), None) is not None
    [plan] = plans
    [scan] = [node for node in _nodes(plan) if node.get("Index Name") == "ix_jobs_queued"]
    assert scan["Actual Loops"] == 3 and scan["Actual Rows"] == 1


def _nodes(plan: dict[str, Any]) -> Iterator[dict[str, Any]]:
    yield plan
    for child in plan.get("Plans", ()):
        yield from _nodes(child)


@pytest.mark.parametrize(
    ("required", "offers", "words"),
    [
        (Required({}, None), [], "a worker; no live worker takes jobs"),
        (Required({}, None), [Offer({}, None, None)], None),
        (Required({}, 5 * GIB), [Offer({}, 5 * GIB, "cpu")], None),
        (Required({}, 5 * GIB), [Offer({}, None, "cuda")], None),
        (Required({}, 5 * GIB, 24 * GIB), [Offer({}, 25 * GIB, "cuda")], None),
        (
            Required({}, 5 * GIB, 24 * GIB),
            [Offer({}, 24 * GIB, "cuda"), Offer({}, None, "cuda")],
            "a worker with more than 24.0 GiB of memory; the live workers offer: 24.0 GiB, memory that is not known",
        ),
        (
            Required({}, 80 * GIB, 24 * GIB),
            [Offer({}, 40 * GIB, "cuda")],
            "a worker with 80.0 GiB of memory; the live workers offer: 40.0 GiB",
        ),
        (
            Required({}, 80 * GIB),
            [Offer({"gpu": "a10"}, 24 * GIB, "cuda")] * 2,
            "a worker with 80.0 GiB of memory; the live workers offer: 24.0 GiB gpu=a10",
        ),
        (
            Required({"gpu": "h100", "zone": "a"}, GIB),
            [Offer({"gpu": "h100"}, 80 * GIB, "cuda"), Offer({}, None, None)],
            "a worker with 1.0 GiB of memory and the labels gpu=h100,zone=a; the live workers offer: 80.0 GiB gpu=h100, "
            "memory that is not known",
        ),
    ],
)
def test_what_a_job_waits_for(required: Required, offers: list[Offer], words: str | None) -> None:
    assert waiting_for(required, offers) == words
