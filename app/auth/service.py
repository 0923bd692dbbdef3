"""API keys: the service shows a secret once and stores its hash; keys can be rotated, or revoked permanently."""

import datetime as dt
import hashlib
import hmac
import secrets
import uuid
from collections.abc import Sequence
from typing import Any, NamedTuple

from pydantic import SecretStr
from sqlalchemy import Executable, Row
from sqlalchemy.orm import Session

from app.auth import repository, vault
from app.auth.models import ApiKey
from app.config import Settings
from secateur.contract.keys import USER, KeySettings, Scope

PREFIX = "sk-secateur-"
TOUCH_EVERY = 60.0
"""Number of seconds between two updates of ``last_used_at``."""


class Caller(NamedTuple):
    """The API key of a request: its id and its scopes, on which the answer depends."""

    id: uuid.UUID
    scopes: Sequence[str]

    @property
    def is_admin(self) -> bool:
        """Whether the caller may read and control the jobs of all API keys."""
        return Scope.ADMIN in self.scopes


def create(
    session: Session, name: str, scopes: Sequence[Scope] = USER, settings: KeySettings | None = None
) -> tuple[ApiKey, str]:
    """Create and return an API key and its secret; the secret cannot be retrieved again. Commits.

    Without ``settings``, or without a namespace in them, the key gets a namespace that no other key has.

    Raises:
        ValueError: the name is blank or has unprintable characters, or there is no scope.
    """
    if not name.strip() or not name.isprintable():
        raise ValueError("a key's name has printable characters alone, and at least one that is no space")
    if not scopes:
        raise ValueError("a key has at least one scope")
    secret = _new_secret()
    columns = (settings or KeySettings()).model_dump(include=set(KeySettings.model_fields))
    key = repository.add(session, name, sorted(set(scopes)), _hash(secret), **columns)
    session.commit()
    return key, secret


def change(session: Session, key_id: uuid.UUID, settings: KeySettings) -> ApiKey | None:
    """Change the settings of an API key that ``settings`` sets, and return the key, or ``None`` if the key does not exist.

    Jobs that were accepted earlier keep the repositories that they publish to. Commits.
    """
    key = repository.lock(session, key_id)
    if key is not None:
        for name, value in settings.model_dump(exclude_unset=True).items():
            setattr(key, name, value)
        key.namespace = key.namespace or repository.own_namespace(key.name, key.id)
    session.commit()
    return key


def every(session: Session) -> Sequence[ApiKey]:
    """Return all API keys, oldest first."""
    return repository.every(session)


def revoke(session: Session, key_id: uuid.UUID) -> ApiKey | None:
    """Revoke an API key, idempotently, and return it, or ``None`` if the key does not exist; commits.

    The key's jobs continue to run; :func:`app.jobs.service.cancel_all` cancels them.
    """
    key = repository.lock(session, key_id)
    if key is not None:
        repository.revoke(session, key)
    session.commit()
    return key


def rotate(session: Session, key_id: uuid.UUID, grace: float) -> tuple[ApiKey, str] | None:
    """Give an API key a new secret and return key and secret; the old secret is valid for ``grace`` seconds; commits.

    The key keeps its jobs. Return ``None`` if the key does not exist or is revoked.
    """
    key = repository.lock(session, key_id)
    if key is None or key.revoked_at is not None:
        session.rollback()
        return None
    secret = _new_secret()
    repository.rotate(session, key, _hash(secret), grace)
    session.commit()
    return key, secret


def keep_hub_token(session: Session, settings: Settings, key_id: uuid.UUID, token: SecretStr | None) -> ApiKey | None:
    """Store the Hub token for those jobs of the API key that bring none; a ``token`` of ``None`` removes it. Commits.

    Return the API key, or ``None`` if it does not exist.

    Raises:
        VaultError: the service has no key with which to encrypt the token.
    """
    key = repository.lock(session, key_id)
    if key is not None:
        key.hub_token = None if token is None else vault.encrypt(settings, token)
    session.commit()
    return key


def is_live(session: Session, key_id: uuid.UUID) -> bool:
    """Return whether an API key that was authenticated earlier still exists and is not revoked."""
    return repository.is_live(session, key_id)


def authenticate(
    session: Session, secret: str, query: Executable = repository.FIND, **parameters: Any
) -> tuple[Caller, Row[Any]] | None:
    """Return the live API key that has ``secret``, and the row of ``query`` (see :func:`app.auth.repository.find`).

    Return ``None`` if no live key has the secret. A plain hash is enough, because the secret has 256 random bits:
    nobody can guess it or look its hash up in a table.
    """
    digest = _hash(secret)
    key = repository.find(session, digest, query, **parameters)
    if key is None or key.revoked_at is not None:
        return None
    if not any(hmac.compare_digest(known or "", digest) for known in (key.secret_sha256, key.previous_sha256)):
        return None
    now = dt.datetime.now(dt.UTC)
    if key.last_used_at is None or (now - key.last_used_at).total_seconds() > TOUCH_EVERY:
        repository.touch(session, key.key_id, TOUCH_EVERY)
    return Caller(key.key_id, key.scopes), key


def _new_secret() -> str:
    return PREFIX + secrets.token_urlsafe(32)


def _hash(secret: str) -> str:
    return hashlib.sha256(secret.encode()).hexdigest()
