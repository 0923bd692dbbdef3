"""No query that is asked again and again reads a whole table, however long the past is."""

import datetime as dt
from typing import Any

import pytest
from sqlalchemy import event, func, update
from sqlalchemy.orm import Session

from app.auth import service as auth
from app.config import Settings
from app.jobs import repository
from app.jobs.models import Job
from benchmarks.history import fill, queries
from secateur.contract.states import State

LONG = ("jobs", "job_events", "job_rounds", "webhook_deliveries", "idempotency_keys")


@pytest.fixture
def plans(session: Session) -> list[str]:
    """Postgres's plan of every statement that this session runs from now on."""
    found: list[str] = []

    def explain(connection: Any, cursor: Any, statement: str, parameters: Any, *_: object) -> None:
        with cursor.connection.cursor() as other:
            rows = other.execute(f"EXPLAIN {statement}", parameters).fetchall()
        found.append("\n".join([statement, *(row[0] for row in rows)]))

    event.listen(session.get_bind(), "before_cursor_execute", explain)
    return found


def test_no_query_scans_a_table_that_grows(
    session: Session, settings: Settings, request: pytest.FixtureRequest
) -> None:
    owner, _ = auth.create(session, "owner")
    fill(session, owner.id, 5000)
    plans: list[str] = request.getfixturevalue("plans")
    scans = {}
    for name, query in queries(settings, owner.id).items():
        plans.clear()
        query(session)
        session.rollback()
        assert plans, name
        if bad := [plan for plan in plans if any(f"Seq Scan on {table}" in plan for table in LONG)]:
            scans[name] = bad
    assert not scans, "\n\n".join([f"{name}:\n" + "\n".join(found) for name, found in scans.items()])


def test_the_metrics_count_what_ended_within_the_hour(session: Session) -> None:
    owner, _ = auth.create(session, "owner")
    fill(session, owner.id, 10)
    assert repository.queue_numbers(session).by_state == {}
    recent = {"finished_at": func.now() - dt.timedelta(minutes=59)}
    session.execute(update(Job).where(Job.state == State.FAILED).values(recent))
    assert repository.queue_numbers(session).by_state == {State.FAILED: 3}
