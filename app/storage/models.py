"""The tables of stored files."""

import datetime as dt
import uuid

from sqlalchemy import BigInteger, ForeignKey, func
from sqlalchemy.orm import Mapped, mapped_column

from app.auth.models import ApiKey
from app.db.base import Base


class StoredFile(Base):
    """A file of the pruned model of a job, which is complete in the object store under ``key``."""

    __tablename__ = "stored_files"

    job_id: Mapped[uuid.UUID] = mapped_column(ForeignKey("jobs.id", ondelete="CASCADE"), primary_key=True)
    name: Mapped[str] = mapped_column(primary_key=True)
    """The file's path below the folder of artifacts, with ``/``."""
    owner_id: Mapped[uuid.UUID] = mapped_column(ForeignKey(ApiKey.id), index=True)
    key: Mapped[str]
    size: Mapped[int] = mapped_column(BigInteger)
    """The number of bytes."""
    sha256: Mapped[str]


class Deletion(Base):
    """A folder of the object store that is to be deleted from ``due_at`` on; the row goes when the folder is gone."""

    __tablename__ = "storage_deletions"

    folder: Mapped[str] = mapped_column(primary_key=True)
    due_at: Mapped[dt.datetime] = mapped_column(server_default=func.now())


class StorageIdentity(Base):
    """The identity of the object store that this database belongs to; the table has one row."""

    __tablename__ = "storage_identity"

    only: Mapped[bool] = mapped_column(primary_key=True, default=True)
    storage_id: Mapped[str]
