"""The whole table of a job's life: every state with every trigger."""

import datetime as dt
from typing import Any

import pytest
from sqlalchemy import select
from sqlalchemy.orm import Session

from app.auth import service as auth
from app.jobs import transitions
from app.jobs.models import Job, JobEvent
from app.jobs.transitions import TransitionRefused, Trigger
from app.webhooks.models import WebhookDelivery
from secateur.contract.states import TERMINAL, State

# Written out, not derived from the code's table: rows are states, "." refuses, "=" changes nothing.
EXPECTED = """
            claim    pause   resume  cancel      stopped    retry   publish     succeed    requeue    fail
queued      running  paused  =       cancelled   .          =       .           .          .          .
running     .        asks    =       cancelling  .          =       publishing  .          queued     failed
publishing  .        .       .       .           .          .       .           succeeded  queued     failed
paused      .        =       queued  cancelled   .          .       .           .          .          .
cancelling  .        .       .       =           cancelled  .       .           .          cancelled  cancelled
succeeded   .        .       .       .           .          .       .           .          .          .
failed      .        .       .       .           .          queued  .           .          .          .
cancelled   .        .       .       =           .          queued  .           .          .          .
"""


def _cells() -> list[tuple[State, Trigger, str]]:
    header, *rows = (line.split() for line in EXPECTED.strip().splitlines())
    return [(State(row[0]), Trigger(name), cell) for row in rows for name, cell in zip(header, row[1:], strict=True)]


CELLS = _cells()


def make_job(session: Session, state: State, **values: Any) -> Job:
    """A job put straight into a state, with all that a state may have to clear."""
    owner, _ = auth.create(session, "owner")
    leased = state in (State.RUNNING, State.PUBLISHING, State.CANCELLING)
    job = Job(
        owner_id=owner.id,
        state=state,
        request={},
        model_id="m",
        method="piem",
        attempt=1,
        worker="w" if leased else None,
        lease_expires_at=dt.datetime.now(dt.UTC) if leased else None,
        finished_at=dt.datetime.now(dt.UTC) if state in TERMINAL else None,
        error={"code": "x", "message": "x", "retryable": True} if state is State.FAILED else None,
    )
    for name, value in values.items():
        setattr(job, name, value)
    session.add(job)
    session.commit()
    return job


def _events(session: Session, job: Job) -> list[dict[str, Any]]:
    return [event.data for event in session.scalars(select(JobEvent).where(JobEvent.job_id == job.id))]


def test_the_table_has_every_pair() -> None:
    assert {(state, trigger) for state, trigger, _ in CELLS} == {(s, t) for s in State for t in Trigger}


@pytest.fixture(scope="module")
def shared(template_database: str, postgres: Any) -> Any:
    """One database for all the cells: each makes its own job."""
    from sqlalchemy import create_engine, make_url

    engine = create_engine(make_url(postgres.url).set(database="postgres"), isolation_level="AUTOCOMMIT")
    with engine.connect() as connection:
        connection.exec_driver_sql(f"CREATE DATABASE cells TEMPLATE {template_database}")
        cells = create_engine(make_url(postgres.url).set(database="cells"))
        yield cells
        cells.dispose()
        connection.exec_driver_sql("DROP DATABASE cells")
    engine.dispose()


@pytest.mark.parametrize(("state", "trigger", "cell"), CELLS, ids=[f"{s}-{t}" for s, t, _ in CELLS])
def test_cell(shared: Any, state: State, trigger: Trigger, cell: str) -> None:
    with Session(shared, expire_on_commit=False) as session:
        job = make_job(session, state)
        if cell == ".":
            with pytest.raises(TransitionRefused) as refused:
                transitions.apply(session, job, trigger)
            assert (refused.value.state, refused.value.trigger) == (state, trigger)
            after = state
        else:
            values: dict[str, Any] = {"worker": "w"} if trigger is Trigger.CLAIM else {}
            transitions.apply(session, job, trigger, **values)
            after = {"=": state, "asks": state}.get(cell) or State(cell)
        session.commit()
        session.refresh(job)
        assert job.state == after
        assert job.pause_requested == (cell == "asks")
        assert job.version == (1 if cell in ".=" else 2)
        assert len(_events(session, job)) == (0 if cell in ".=" else 1)
        assert (job.finished_at is not None) == (after in TERMINAL)
        assert (job.error is not None) == (after is State.FAILED and state is State.FAILED)
        if after not in (State.RUNNING, State.PUBLISHING, State.CANCELLING):
            assert job.lease_expires_at is None and job.worker is None
        elif state is not State.QUEUED:
            assert job.lease_expires_at is not None and job.worker == "w"


def test_a_pause_request_is_withdrawn_by_resume(session: Session) -> None:
    job = make_job(session, State.RUNNING)
    transitions.apply(session, job, Trigger.PAUSE)
    transitions.apply(session, job, Trigger.PAUSE)
    assert job.pause_requested and job.version == 2
    transitions.apply(session, job, Trigger.RESUME)
    assert not job.pause_requested and job.version == 3


def test_a_pause_request_outlives_the_attempt(session: Session) -> None:
    job = make_job(session, State.RUNNING, pause_requested=True)
    transitions.apply(session, job, Trigger.RETRY)
    assert job.pause_requested, "a retry that changes nothing withdraws nothing"
    transitions.apply(session, job, Trigger.REQUEUE)
    assert job.state == State.PAUSED and not job.pause_requested


def test_what_may_be_published_can_only_be_completed(session: Session) -> None:
    job = make_job(session, State.RUNNING)
    for trigger in (Trigger.PUBLISH, Trigger.REQUEUE):
        transitions.apply(session, job, trigger)
    assert job.state == State.QUEUED
    for trigger in (Trigger.CANCEL, Trigger.PAUSE):
        with pytest.raises(TransitionRefused, match="may be published"):
            transitions.apply(session, job, trigger)


@pytest.mark.parametrize(
    ("state", "trigger", "owed"),
    [(State.PUBLISHING, Trigger.SUCCEED, 1), (State.QUEUED, Trigger.CANCEL, 1), (State.RUNNING, Trigger.REQUEUE, 0)],
)
def test_the_end_owes_a_webhook(session: Session, state: State, trigger: Trigger, owed: int) -> None:
    job = make_job(session, state, request={"webhook_url": "http://127.0.0.1/x"})
    values: dict[str, Any] = {"result": {"repo_id": "a/b"}} if trigger is Trigger.SUCCEED else {}
    transitions.apply(session, job, trigger, **values)
    session.commit()
    deliveries = session.scalars(select(WebhookDelivery)).all()
    assert len(deliveries) == owed
    for delivery in deliveries:
        assert delivery.payload["type"] == f"job.{job.state}"
        assert delivery.payload["data"]["result"] == job.result


def test_no_webhook_without_a_url_or_twice(session: Session) -> None:
    job = make_job(session, State.QUEUED)
    transitions.apply(session, job, Trigger.CANCEL)
    asked = make_job(session, State.QUEUED, request={"webhook_url": "http://127.0.0.1/x"})
    transitions.apply(session, asked, Trigger.CANCEL)
    transitions.apply(session, asked, Trigger.CANCEL)
    session.commit()
    assert [delivery.job_id for delivery in session.scalars(select(WebhookDelivery))] == [asked.id]
