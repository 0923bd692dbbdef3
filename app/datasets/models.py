"""The table of data sets."""

import datetime as dt
import uuid

from sqlalchemy import BigInteger, ForeignKey, func
from sqlalchemy.orm import Mapped, mapped_column

from app.auth.models import ApiKey
from app.db.base import Base, new_id


class Dataset(Base):
    """A text or a list of texts or chats that was uploaded, and is complete in the object store under ``key``."""

    __tablename__ = "datasets"

    id: Mapped[uuid.UUID] = mapped_column(primary_key=True, default=new_id)
    owner_id: Mapped[uuid.UUID] = mapped_column(ForeignKey(ApiKey.id), index=True)
    name: Mapped[str]
    kind: Mapped[str]
    """A value of :class:`secateur.contract.datasets.DatasetKind`."""
    size: Mapped[int] = mapped_column(BigInteger)
    """The number of bytes."""
    lines: Mapped[int] = mapped_column(BigInteger)
    sha256: Mapped[str]
    key: Mapped[str]
    created_at: Mapped[dt.datetime] = mapped_column(server_default=func.now())
