"""Which API key's jobs made which repository: a repository is written by the jobs of one API key alone."""

import datetime as dt
import uuid
from collections.abc import Sequence

from sqlalchemy import delete, func, select
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.orm import Mapped, Session, mapped_column

from app.db.base import Base
from secateur.contract.errors import ErrorCode, PruningError


class Repository(Base):
    """A repository that a job published, or began to publish; the repository outlives the job."""

    __tablename__ = "repositories"

    repo_id: Mapped[str] = mapped_column(primary_key=True)
    """Name of the repository in lower case, because names on a Hub that differ in case only are one repository."""
    owner_id: Mapped[uuid.UUID]
    job_id: Mapped[uuid.UUID] = mapped_column(index=True)
    """The job that claimed the repository first."""
    created_at: Mapped[dt.datetime] = mapped_column(server_default=func.now())


def check(session: Session, owner_id: uuid.UUID, repo_ids: Sequence[str]) -> None:
    """Check that no job of another API key than ``owner_id`` made one of the repositories.

    Raises:
        PruningError: ``repository_taken``.
    """
    names = {repo_id.lower(): repo_id for repo_id in repo_ids}
    query = select(Repository.repo_id).where(Repository.repo_id.in_(names), Repository.owner_id != owner_id)
    taken = session.scalars(query.order_by(Repository.repo_id).limit(1)).first()
    if taken is not None:
        message = f"A job of another API key made the repository '{names[taken]}'; choose another name."
        raise PruningError(ErrorCode.REPOSITORY_TAKEN, message, field="publish.repo_id")


def claim(session: Session, owner_id: uuid.UUID, job_id: uuid.UUID, repo_ids: Sequence[str]) -> None:
    """Record that the repositories belong to the API key of the job; the caller commits.

    A concurrent claim of another job is waited for.

    Raises:
        PruningError: ``repository_taken`` if a job of another API key made one of the repositories.
    """
    names = sorted(repo_id.lower() for repo_id in repo_ids)  # in one order, so that two jobs never wait for each other
    for name in names:
        row = insert(Repository).values(repo_id=name, owner_id=owner_id, job_id=job_id)
        session.execute(row.on_conflict_do_nothing())
    check(session, owner_id, repo_ids)


def release(session: Session, job_id: uuid.UUID) -> None:
    """Forget the repositories that the job claimed first, because the Hub let it write none; the caller commits."""
    session.execute(delete(Repository).where(Repository.job_id == job_id))
