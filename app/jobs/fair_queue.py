"""The fair order in which queued jobs are taken, and what a worker must offer to take a job.

The next job comes from the API key of which workers run the fewest jobs; among those, from the key that used the least
worker time in the last 24 hours; among those, from the key whose next job is the oldest. The jobs of one key follow
their priority, and then their age. A priority orders the jobs of one key alone, so no key gains by raising it.
"""

import datetime as dt
import uuid
from collections.abc import Sequence

from sqlalchemy import ColumnElement, Integer, Interval, Select, and_, bindparam, func, or_, select, true
from sqlalchemy.orm import Session

from app.auth.models import ApiKey
from app.fleet.repository import Offer
from app.jobs.models import Attempt, Job
from secateur.contract.states import State

WINDOW = dt.timedelta(hours=24)
CLAIMS = 0x5EC47E00
"""Number of the advisory lock that a claim holds until its transaction ends."""

QUEUED = Job.state == State.QUEUED
IS_DUE = or_(Job.not_before.is_(None), Job.not_before <= func.now())

_RUNNING = (
    select(Job.owner_id, func.count().label("jobs"))
    .where(Job.lease_expires_at.is_not(None))
    .group_by(Job.owner_id)
    .subquery("running")
)
_SINCE = func.now() - WINDOW
_TIME = func.coalesce(Attempt.ended_at, func.now()) - func.greatest(Attempt.started_at, _SINCE)
_USED = (
    select(func.coalesce(func.sum(_TIME, type_=Interval), dt.timedelta()))
    .where(Attempt.owner_id == ApiKey.id, or_(Attempt.ended_at.is_(None), Attempt.ended_at > _SINCE))
    .scalar_subquery()
)


def lock(session: Session) -> None:
    """Wait until no other transaction claims a job, and keep other claims waiting until this transaction ends."""
    session.execute(select(func.pg_advisory_xact_lock(CLAIMS)))


def holds(offer: Offer) -> ColumnElement[bool]:
    """Return the condition that a worker with ``offer`` can hold a job.

    A job whose need of memory is not known fits every worker, and a worker whose memory is not known holds every job. A
    job for which a worker was too small fits only workers that are known to have more memory.
    """
    labelled = Job.required_labels.contained_by(offer.labels)
    least, outgrown = Job.required_memory_bytes, Job.outgrown_memory_bytes
    if offer.memory_bytes is None:
        return and_(labelled, outgrown.is_(None))
    return and_(
        labelled,
        or_(least.is_(None), least <= offer.memory_bytes),
        or_(outgrown.is_(None), outgrown < offer.memory_bytes),
    )


def first(
    session: Session, offer: Offer, max_running: int | None, passed: Sequence[uuid.UUID] = ()
) -> uuid.UUID | None:
    """Return the id of the first job in the fair order that a worker with ``offer`` may take, or ``None``.

    Jobs in ``passed``, and those of API keys of which workers own ``max_running`` jobs, are left out.
    """
    return session.scalar(order(offer, passed).limit(1), {"max_running": max_running})


def order(offer: Offer, passed: Sequence[uuid.UUID]) -> Select[uuid.UUID]:
    """Return the query of the next job of each API key, in the fair order; it reads one row of the queue for each key."""
    head = (
        select(Job.id)
        .where(Job.owner_id == ApiKey.id, QUEUED, IS_DUE, holds(offer), Job.id.not_in(passed))
        .order_by(Job.priority.desc(), Job.id)
        .limit(1)
        .lateral("head")
    )
    running = func.coalesce(_RUNNING.c.jobs, 0)
    limit = func.coalesce(ApiKey.max_running_jobs, bindparam("max_running", type_=Integer))
    return (
        select(head.c.id)
        .select_from(ApiKey)
        .join(head, true())
        .outerjoin(_RUNNING, _RUNNING.c.owner_id == ApiKey.id)
        .where(or_(limit.is_(None), running < limit))
        .order_by(running, _USED, head.c.id)
    )
