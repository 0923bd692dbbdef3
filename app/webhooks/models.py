"""The database table that serves as the outbox of webhooks."""

import datetime as dt
import uuid
from typing import Any

from sqlalchemy import ForeignKey, Index, func, text
from sqlalchemy.orm import Mapped, mapped_column

from app.db.base import Base, new_id


class WebhookDelivery(Base):
    """A message that must be delivered to a URL; the transaction that ends the job writes it.

    ``next_attempt_at`` is set while the message is still to be delivered. ``id`` is the ``webhook-id`` of every
    attempt.
    """

    __tablename__ = "webhook_deliveries"
    __table_args__ = (
        Index("ix_webhook_deliveries_due", "next_attempt_at", postgresql_where=text("next_attempt_at IS NOT NULL")),
        Index("ix_webhook_deliveries_job_id", "job_id"),
        Index(
            "ix_webhook_deliveries_given_up",
            "created_at",
            postgresql_where=text("next_attempt_at IS NULL AND delivered_at IS NULL"),
        ),
    )

    id: Mapped[uuid.UUID] = mapped_column(primary_key=True, default=new_id)
    job_id: Mapped[uuid.UUID] = mapped_column(ForeignKey("jobs.id", ondelete="CASCADE"))
    url: Mapped[str]
    payload: Mapped[dict[str, Any]]
    attempts: Mapped[int] = mapped_column(default=0)
    next_attempt_at: Mapped[dt.datetime | None] = mapped_column(server_default=func.now())
    delivered_at: Mapped[dt.datetime | None]
    last_error: Mapped[str | None]
    created_at: Mapped[dt.datetime] = mapped_column(server_default=func.now())
