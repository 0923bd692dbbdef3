"""Queries on the table of API keys. The database's clock sets all times."""

import datetime as dt
import re
import uuid
from collections.abc import Sequence
from typing import Any

from sqlalchemy import Executable, Row, bindparam, func, or_, select, update
from sqlalchemy.orm import Session

from app.auth.models import ApiKey
from app.db.base import new_id

# This statement is built once, because every request uses it and building it takes longer than the database's answer.
FIND = select(
    ApiKey.id.label("key_id"),
    ApiKey.scopes,
    ApiKey.secret_sha256,
    ApiKey.previous_sha256,
    ApiKey.revoked_at,
    ApiKey.last_used_at,
).where(
    or_(
        ApiKey.secret_sha256 == bindparam("digest"),
        (ApiKey.previous_sha256 == bindparam("digest")) & (ApiKey.previous_expires_at > func.now()),
    )
)


def add(
    session: Session, name: str, scopes: Sequence[str], secret_sha256: str, namespace: str | None, **settings: Any
) -> ApiKey:
    """Add and return a new API key with these columns; the caller commits.

    Without ``namespace``, the key gets one that is made from its name and its id and that no other key has.
    """
    key_id = new_id()
    namespace = namespace or own_namespace(name, key_id)
    key = ApiKey(
        id=key_id, name=name, scopes=list(scopes), secret_sha256=secret_sha256, namespace=namespace, **settings
    )
    session.add(key)
    session.flush()
    return key


def own_namespace(name: str, key_id: uuid.UUID) -> str:
    """Return the namespace of an API key for which the operator names none; no other key has it."""
    slug = re.sub(r"[^a-z0-9]+", "-", name.lower())[:20].strip("-") or "key"
    return f"{slug}-{key_id.hex[-12:]}"  # the random end of a UUIDv7


def find(session: Session, secret_sha256: str, query: Executable, **parameters: Any) -> Row[Any] | None:
    """Return the row of ``query`` for the API key with this secret hash, or ``None``.

    ``query`` is :data:`FIND`, with further columns if the caller needs them. A key also matches by its previous secret
    until that secret expires. The key may be revoked.
    """
    past_the_orm = session.connection()  # the query returns plain columns, so the ORM would only cost time
    return past_the_orm.execute(query, {"digest": secret_sha256} | parameters).one_or_none()


def is_live(session: Session, key_id: uuid.UUID) -> bool:
    """Return whether the API key exists and is not revoked."""
    return session.scalar(select(ApiKey.id).where(ApiKey.id == key_id, ApiKey.revoked_at.is_(None))) is not None


def every(session: Session) -> Sequence[ApiKey]:
    """Return all API keys, oldest first."""
    return session.scalars(select(ApiKey).order_by(ApiKey.id)).all()


def lock(session: Session, key_id: uuid.UUID) -> ApiKey | None:
    """Return the API key, locked until the transaction ends, or ``None`` if it does not exist.

    Rows that refer to the key can be written meanwhile (``FOR NO KEY UPDATE``): a transaction that ends a job counts the
    usage first and may then have the job's reference to the key checked, and one that submits a job does the reverse.
    """
    return session.get(ApiKey, key_id, with_for_update={"key_share": True}, populate_existing=True)


def revoke(session: Session, key: ApiKey) -> None:
    """Revoke the locked API key permanently; the caller commits."""
    key.revoked_at = key.revoked_at or dt.datetime.now(dt.UTC)


def rotate(session: Session, key: ApiKey, secret_sha256: str, grace: float) -> None:
    """Give the locked API key a new secret; the previous one stays valid for ``grace`` seconds. The caller commits."""
    key.previous_sha256, key.secret_sha256 = key.secret_sha256, secret_sha256
    session.flush()
    session.execute(
        update(ApiKey)
        .where(ApiKey.id == key.id)
        .values(previous_expires_at=func.now() + dt.timedelta(seconds=grace))
        .execution_options(synchronize_session=False)
    )
    session.refresh(key)


def touch(session: Session, key_id: uuid.UUID, every_seconds: float) -> None:
    """Record that the API key is used, at most once in ``every_seconds``; commits."""
    before = func.now() - dt.timedelta(seconds=every_seconds)
    session.execute(
        update(ApiKey)
        .where(ApiKey.id == key_id, (ApiKey.last_used_at.is_(None)) | (ApiKey.last_used_at < before))
        .values(last_used_at=func.now())
    )
    session.commit()
