"""``Idempotency-Key``: requests with the same key and the same body create one job, however often they are sent.

This follows draft-ietf-httpapi-idempotency-key-header. The requests may also arrive at the same time. Keys are scoped
by API key.
"""

import datetime as dt
import hashlib
import json
import uuid
from typing import Any

from sqlalchemy import ForeignKey, Index, delete, func, select
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.orm import Mapped, Session, mapped_column

from app.auth.models import ApiKey
from app.db.base import Base


class IdempotencyKey(Base):
    """An idempotency key that was used; ``job_id`` becomes null when the key's job is deleted."""

    __tablename__ = "idempotency_keys"
    __table_args__ = (Index("ix_idempotency_keys_created_at", "created_at"),)

    owner_id: Mapped[uuid.UUID] = mapped_column(ForeignKey(ApiKey.id), primary_key=True)
    key: Mapped[str] = mapped_column(primary_key=True)
    request_sha256: Mapped[str]
    job_id: Mapped[uuid.UUID | None] = mapped_column(ForeignKey("jobs.id", ondelete="SET NULL"), index=True)
    created_at: Mapped[dt.datetime] = mapped_column(server_default=func.now())


def fingerprint(body: dict[str, Any]) -> str:
    """Return a hash of the body; bodies that differ only in field order or spacing have the same hash."""
    digest = hashlib.sha256()
    for piece in json.JSONEncoder(sort_keys=True).iterencode(body):  # in one piece, long texts would be copied twice
        digest.update(piece.encode())
    return digest.hexdigest()


def recall(session: Session, owner_id: uuid.UUID, key: str, ttl: float) -> IdempotencyKey | None:
    """Return the row of an idempotency key that was used within the last ``ttl`` seconds, or ``None``."""
    since = func.now() - dt.timedelta(seconds=ttl)
    return session.scalars(
        select(IdempotencyKey).where(
            IdempotencyKey.owner_id == owner_id, IdempotencyKey.key == key, IdempotencyKey.created_at > since
        )
    ).one_or_none()


def remember(
    session: Session, owner_id: uuid.UUID, key: str, request_sha256: str, job_id: uuid.UUID, ttl: float
) -> bool:
    """Take the idempotency key for ``job_id`` within the caller's transaction and return whether this succeeded.

    Return false if another request has the key. Wait for a concurrent transaction that is taking the same key. Replace
    a key older than ``ttl`` seconds.
    """
    row = {"request_sha256": request_sha256, "job_id": job_id, "created_at": func.now()}
    taken = session.execute(
        insert(IdempotencyKey)
        .values(owner_id=owner_id, key=key, **row)
        .on_conflict_do_update(
            index_elements=["owner_id", "key"],
            set_=row,
            where=IdempotencyKey.created_at <= func.now() - dt.timedelta(seconds=ttl),
        )
        .returning(IdempotencyKey.key)
    )
    return taken.first() is not None


def delete_expired(session: Session, ttl: float) -> None:
    """Delete the idempotency keys older than ``ttl`` seconds; commits."""
    session.execute(delete(IdempotencyKey).where(IdempotencyKey.created_at <= func.now() - dt.timedelta(seconds=ttl)))
    session.commit()
