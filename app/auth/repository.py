"""Queries on the table of API keys."""

import datetime as dt
import uuid
from collections.abc import Sequence

from sqlalchemy import bindparam, func, select, update
from sqlalchemy.orm import Session

from app.auth.models import ApiKey

# Built once, as every request asks it: making a statement takes longer than the database's answer.
FIND = select(ApiKey).where(ApiKey.secret_sha256 == bindparam("digest"))


def add(session: Session, name: str, secret_sha256: str) -> ApiKey:
    """A new key; the caller commits."""
    key = ApiKey(name=name, secret_sha256=secret_sha256)
    session.add(key)
    session.flush()
    return key


def find(session: Session, secret_sha256: str) -> ApiKey | None:
    """The key with this hash, revoked or not."""
    return session.scalars(FIND, {"digest": secret_sha256}).one_or_none()


def is_live(session: Session, key_id: uuid.UUID) -> bool:
    """Whether the key is there and not revoked."""
    return session.scalar(select(ApiKey.id).where(ApiKey.id == key_id, ApiKey.revoked_at.is_(None))) is not None


def every(session: Session) -> Sequence[ApiKey]:
    """All keys, oldest first."""
    return session.scalars(select(ApiKey).order_by(ApiKey.id)).all()


def revoke(session: Session, key_id: uuid.UUID) -> ApiKey | None:
    """Revoke the key, once and for all; ``None`` if there is none. The caller commits."""
    key = session.get(ApiKey, key_id, with_for_update=True)
    if key is not None and key.revoked_at is None:
        key.revoked_at = dt.datetime.now(dt.UTC)
    return key


def touch(session: Session, key_id: uuid.UUID, every_seconds: float) -> None:
    """Note that the key is used, at most once in ``every_seconds``; commits."""
    before = func.now() - dt.timedelta(seconds=every_seconds)
    session.execute(
        update(ApiKey)
        .where(ApiKey.id == key_id, (ApiKey.last_used_at.is_(None)) | (ApiKey.last_used_at < before))
        .values(last_used_at=func.now())
    )
    session.commit()
