"""The table of API keys."""

import datetime as dt
import uuid

from sqlalchemy import func
from sqlalchemy.orm import Mapped, mapped_column

from app.db.base import Base, new_id


class ApiKey(Base):
    """Who may call ``/v1``; a job belongs to the key that made it. The secrets themselves are never stored.

    A key that was rotated takes its previous secret too, until ``previous_expires_at``.
    """

    __tablename__ = "api_keys"

    id: Mapped[uuid.UUID] = mapped_column(primary_key=True, default=new_id)
    name: Mapped[str]
    scopes: Mapped[list[str]]
    secret_sha256: Mapped[str] = mapped_column(unique=True)
    previous_sha256: Mapped[str | None] = mapped_column(unique=True)
    previous_expires_at: Mapped[dt.datetime | None]
    hub_token: Mapped[bytes | None] = mapped_column(deferred=True)
    """For all its jobs; encrypted, see :mod:`app.auth.vault`."""
    created_at: Mapped[dt.datetime] = mapped_column(server_default=func.now())
    revoked_at: Mapped[dt.datetime | None]
    last_used_at: Mapped[dt.datetime | None]
    """Right to the minute."""
