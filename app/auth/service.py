"""API keys: made once, shown once, stored as a hash, revoked for good."""

import datetime as dt
import hashlib
import hmac
import secrets
import uuid
from collections.abc import Sequence

from sqlalchemy.orm import Session

from app.auth import repository
from app.auth.models import ApiKey

PREFIX = "sk-secateur-"
TOUCH_EVERY = 60.0
"""Seconds between two updates of ``last_used_at``."""


def create(session: Session, name: str) -> tuple[ApiKey, str]:
    """A new key and its secret, which cannot be had again; commits.

    Raises:
        ValueError: the name is none to show in a list.
    """
    if not name.strip() or not name.isprintable():
        raise ValueError("a key's name has printable characters alone, and at least one that is no space")
    secret = PREFIX + secrets.token_urlsafe(32)
    key = repository.add(session, name, _hash(secret))
    session.commit()
    return key, secret


def every(session: Session) -> Sequence[ApiKey]:
    """All keys, oldest first."""
    return repository.every(session)


def revoke(session: Session, key_id: uuid.UUID) -> ApiKey | None:
    """Revoke a key, idempotently; ``None`` if there is no such key; commits."""
    key = repository.revoke(session, key_id)
    session.commit()
    return key


def is_live(session: Session, key_id: uuid.UUID) -> bool:
    """Whether a key that was authenticated earlier still is one."""
    return repository.is_live(session, key_id)


def authenticate(session: Session, secret: str) -> ApiKey | None:
    """The live key that ``secret`` belongs to.

    A plain hash is enough: the secret has 256 random bits, so there is nothing to guess or to look up in a table.
    """
    digest = _hash(secret)
    key = repository.find(session, digest)
    if key is None or key.revoked_at is not None or not hmac.compare_digest(key.secret_sha256, digest):
        return None
    now = dt.datetime.now(dt.UTC)
    if key.last_used_at is None or (now - key.last_used_at).total_seconds() > TOUCH_EVERY:
        repository.touch(session, key.id, TOUCH_EVERY)
    return key


def _hash(secret: str) -> str:
    return hashlib.sha256(secret.encode()).hexdigest()
