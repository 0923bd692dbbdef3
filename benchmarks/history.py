"""Finished jobs in large number, and the queries whose time must not grow with this number."""

import uuid
from collections.abc import Callable

from sqlalchemy import select, text
from sqlalchemy.orm import Session

from app.config import Settings
from app.fleet import repository as fleet
from app.fleet.repository import Offer
from app.http import idempotency
from app.jobs import fair_queue, leases, repository
from app.jobs.models import Job
from app.webhooks import repository as webhooks
from secateur.contract.states import State

Query = Callable[[Session], object]

FILL = """
WITH made AS (
    INSERT INTO jobs (id, owner_id, state, version, request, model_id, method, labels, attempt, failures, losses, pause_requested,
        may_be_published, expired, result, report, created_at, started_at, finished_at)
    SELECT uuidv7(-make_interval(hours => 1, secs => number)), :owner_id,
        (ARRAY['succeeded', 'succeeded', 'failed', 'cancelled'])[1 + number % 4], 9, '{"rounds": 3}',
        'org/model-' || number % 7, (ARRAY['piem-lsps', 'flap', 'wanda'])[1 + number % 3],
        jsonb_build_object('team', 'team-' || number % 5, 'run', number::text), 1, 0, 0, false, number % 4 < 2, false,
        '{"repo_id": "org/pruned"}', jsonb_build_object('text', repeat('x', 1000)),
        now() - make_interval(hours => 1, secs => number), now() - make_interval(hours => 1, secs => number),
        now() - make_interval(hours => 1, secs => number)
    FROM generate_series(1, :jobs) AS number
    RETURNING id
), happened AS (
    INSERT INTO job_events (job_id, attempt, type, data)
    SELECT id, 1, 'step', '{"number": 1, "kind": "round", "perplexity": 30.5}' FROM made, generate_series(1, 5)
), delivered AS (
    INSERT INTO webhook_deliveries (id, job_id, url, payload, attempts, next_attempt_at, delivered_at)
    SELECT gen_random_uuid(), id, 'https://example.org/hook', '{}', 1, NULL, now() FROM made
), remembered AS (
    INSERT INTO idempotency_keys (owner_id, key, request_sha256, job_id)
    SELECT :owner_id, id::text, repeat('0', 64), id FROM made
)
INSERT INTO job_steps (job_id, number, attempt, data)
SELECT id, number, 1, '{"perplexity": 30.5}' FROM made, generate_series(0, 2) AS number
"""


def fill(session: Session, owner_id: uuid.UUID, jobs: int) -> None:
    """Add finished jobs of ``owner_id`` with events, rounds, a delivered webhook and an idempotency key each; commits."""
    session.execute(text("SET LOCAL statement_timeout = 0"))
    session.execute(text(FILL), {"owner_id": owner_id, "jobs": jobs})
    session.commit()
    session.connection(execution_options={"isolation_level": "AUTOCOMMIT"}).execute(text("VACUUM ANALYZE"))
    session.commit()


def queries(settings: Settings, owner_id: uuid.UUID) -> dict[str, Query]:
    """Return the frequent queries of the API, the workers and the scheduler, by name. Some of them commit."""

    def listing(
        *,
        states: tuple[State, ...] = (),
        method: str | None = None,
        model_id: str | None = None,
        labels: dict[str, str] | None = None,
        later: bool = False,
    ) -> Query:
        def run(session: Session) -> object:
            middle = select(Job.id).where(Job.owner_id == owner_id).order_by(Job.id).limit(1).offset(20)
            before = session.scalar(middle) if later else None
            return repository.newest(
                session,
                owner_id,
                states=states,
                method=method,
                model_id=model_id,
                labels=labels or {},
                before=before,
                limit=51,
            )

        return run

    def claim(session: Session) -> object:
        job = Job(owner_id=owner_id, request={"rounds": 3}, model_id="org/model-1", method="flap", labels={})
        repository.add(session, job)
        session.commit()
        fleet.beat(session, "worker", "worker", {"memory_bytes": 2**40})
        return leases.claim_next(session, "worker", 60, 1000)

    def events(session: Session) -> object:
        newest = select(Job.id).where(Job.owner_id == owner_id).order_by(Job.id.desc()).limit(1)
        return repository.events(session, session.scalars(newest).one(), 0, 51)

    return {
        "list": listing(),
        "list, an old page": listing(later=True),
        "list, one state": listing(states=(State.SUCCEEDED,)),
        "list, two states": listing(states=(State.FAILED, State.CANCELLED)),
        "list, states without jobs": listing(states=(State.PAUSED, State.CANCELLING)),
        "list, method": listing(method="flap"),
        "list, method without jobs": listing(method="magnitude"),
        "list, model": listing(model_id="org/model-3"),
        "list, model without jobs": listing(model_id="org/none"),
        "list, a common label": listing(labels={"team": "team-1"}),
        "list, a rare label": listing(labels={"run": "42"}),
        "list, state, method and label": listing(states=(State.FAILED,), method="wanda", labels={"team": "team-2"}),
        "events of a job": events,
        "create and claim a job": claim,
        "scheduler: a job for an idle worker": lambda session: fair_queue.first(session, Offer({}, 2**40, "cpu"), None),
        "scheduler: expired files": lambda session: repository.with_expired_files(session, 100),
        "scheduler: lost workers": lambda session: leases.reap(session, leases.Patience.of(settings)),
        "scheduler: webhooks": lambda session: webhooks.claim_due(session, (), 10),
        "scheduler: idempotency keys": lambda session: idempotency.delete_expired(session, settings.idempotency_ttl),
        "metrics: queue": repository.queue_numbers,
        "metrics: workers": lambda session: fleet.live(session, settings.heartbeat_interval),
    }
