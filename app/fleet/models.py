"""The database table of the processes that report heartbeats."""

import datetime as dt
from typing import Any

from sqlalchemy import func
from sqlalchemy.orm import Mapped, mapped_column

from app.db.base import Base


class Worker(Base):
    """A process that sends heartbeats; ``kind`` is its role, and ``info`` describes the hardware it runs on."""

    __tablename__ = "workers"

    name: Mapped[str] = mapped_column(primary_key=True)
    kind: Mapped[str]
    info: Mapped[dict[str, Any]]
    drain: Mapped[str | None]
    """How an operator drains the worker, a name of :class:`secateur.contract.workers.Drain`; ``None``: not at all."""
    started_at: Mapped[dt.datetime] = mapped_column(server_default=func.now())
    last_seen_at: Mapped[dt.datetime] = mapped_column(server_default=func.now())
