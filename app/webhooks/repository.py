"""Queries on the outbox of webhooks. The database's clock sets all times."""

import datetime as dt
import uuid
from collections.abc import Sequence

from sqlalchemy import func, select, update
from sqlalchemy.orm import Session

from app.jobs.models import Job
from app.webhooks.models import WebhookDelivery


def owe(session: Session, job: Job) -> None:
    """Add a message about the end of ``job`` to the outbox if the job has a ``webhook_url``; the caller commits."""
    url = job.request.get("webhook_url")
    if url is None:
        return
    data = {
        "id": str(job.id),
        "state": job.state,
        "model_id": job.model_id,
        "method": job.method,
        "labels": job.labels,
        "error": job.error,
        "result": job.result,
    }
    finished_at = job.finished_at or dt.datetime.now(dt.UTC)
    payload = {"type": f"job.{job.state}", "timestamp": finished_at.isoformat(), "data": data}
    session.add(WebhookDelivery(job_id=job.id, url=url, payload=payload))


def counts(session: Session) -> tuple[int, int]:
    """Return the number of deliveries still to be made and the number given up within the last day."""
    pending = select(func.count()).where(WebhookDelivery.next_attempt_at.is_not(None))
    since = WebhookDelivery.created_at > func.now() - dt.timedelta(days=1)
    given_up = WebhookDelivery.next_attempt_at.is_(None) & WebhookDelivery.delivered_at.is_(None)
    failed = select(func.count()).where(since, given_up)
    return session.scalar(pending) or 0, session.scalar(failed) or 0


def claim_due(session: Session, backoff: Sequence[float], limit: int) -> Sequence[WebhookDelivery]:
    """Take up to ``limit`` due deliveries for one attempt each; commits.

    The time of the next attempt is set before the current attempt is made, so that a process that dies in between
    leaves the delivery due again. ``backoff`` lists the waits between attempts, in seconds; after one attempt for each
    wait and one further attempt, a delivery has no next attempt.
    """
    due = session.scalars(
        select(WebhookDelivery)
        .where(WebhookDelivery.next_attempt_at <= func.now())
        .order_by(WebhookDelivery.next_attempt_at)
        .limit(limit)
        .with_for_update(skip_locked=True)
    ).all()
    for delivery in due:
        wait = backoff[delivery.attempts] if delivery.attempts < len(backoff) else None
        delivery.attempts += 1
        delivery.next_attempt_at = None if wait is None else func.now() + dt.timedelta(seconds=wait)
    session.commit()
    return due


def delivered(session: Session, delivery_id: uuid.UUID) -> None:
    """Record that the receiver accepted the delivery; commits."""
    done = {"delivered_at": func.now(), "next_attempt_at": None, "last_error": None}
    session.execute(update(WebhookDelivery).where(WebhookDelivery.id == delivery_id).values(done))
    session.commit()


def failed(session: Session, delivery_id: uuid.UUID, error: str) -> None:
    """Record that an attempt at the delivery failed; commits."""
    session.execute(update(WebhookDelivery).where(WebhookDelivery.id == delivery_id).values(last_error=error))
    session.commit()


def disable(session: Session, url: str) -> None:
    """Stop all pending deliveries to ``url``, because its receiver no longer exists; commits."""
    pending = WebhookDelivery.url == url, WebhookDelivery.next_attempt_at.is_not(None)
    session.execute(update(WebhookDelivery).where(*pending).values(next_attempt_at=None, last_error="410 Gone"))
    session.commit()
