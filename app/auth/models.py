"""The table of API keys."""

import datetime as dt
import uuid

from sqlalchemy import func
from sqlalchemy.orm import Mapped, mapped_column

from app.db.base import Base, new_id


class ApiKey(Base):
    """An API key, which may call ``/v1``; a job belongs to the key that created it.

    The table never stores the secrets themselves.

    After a rotation, the service also accepts the key's previous secret until ``previous_expires_at``.
    """

    __tablename__ = "api_keys"

    id: Mapped[uuid.UUID] = mapped_column(primary_key=True, default=new_id)
    name: Mapped[str]
    scopes: Mapped[list[str]]
    secret_sha256: Mapped[str] = mapped_column(unique=True)
    previous_sha256: Mapped[str | None] = mapped_column(unique=True)
    previous_expires_at: Mapped[dt.datetime | None]
    hub_token: Mapped[bytes | None] = mapped_column(deferred=True)
    """Hub token for the jobs of this key that bring no token of their own; encrypted, see :mod:`app.auth.vault`."""
    namespace: Mapped[str]
    """Namespace of the repositories that the key's jobs publish by default, and the only one that they may write with
    the service's Hub token or in its Hub folder."""
    lend_hub_token: Mapped[bool] = mapped_column(default=False)
    """Whether requests and jobs of this key that bring no Hub token use the service's."""
    max_open_jobs: Mapped[int | None]
    """Largest number of the key's jobs that have not ended; ``None``: the setting of the same name."""
    max_running_jobs: Mapped[int | None]
    """Largest number of the key's jobs that workers run at once; ``None``: the setting of the same name."""
    created_at: Mapped[dt.datetime] = mapped_column(server_default=func.now())
    revoked_at: Mapped[dt.datetime | None]
    last_used_at: Mapped[dt.datetime | None]
    """Time of the last use, accurate to the minute."""
