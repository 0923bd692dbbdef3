"""Queries on the table of data sets."""

import uuid
from collections.abc import Iterable, Sequence

from sqlalchemy import select
from sqlalchemy.orm import Session

from app.datasets.models import Dataset


def get(session: Session, owner_id: uuid.UUID | None, dataset_id: uuid.UUID) -> Dataset | None:
    """Return the owner's data set, or ``None``. An ``owner_id`` of ``None`` finds the data sets of all owners."""
    query = select(Dataset).where(Dataset.id == dataset_id)
    return session.scalars(query if owner_id is None else query.where(Dataset.owner_id == owner_id)).one_or_none()


def found(session: Session, owner_id: uuid.UUID, dataset_ids: Iterable[uuid.UUID]) -> Sequence[Dataset]:
    """Return those of the data sets that exist and belong to the owner."""
    return session.scalars(select(Dataset).where(Dataset.owner_id == owner_id, Dataset.id.in_(list(dataset_ids)))).all()


def newest(session: Session, owner_id: uuid.UUID | None, before: uuid.UUID | None, limit: int) -> Sequence[Dataset]:
    """Return up to ``limit`` of the owner's data sets, newest first, from the one after the data set ``before`` on.

    An ``owner_id`` of ``None`` lists the data sets of all owners.
    """
    query = select(Dataset).order_by(Dataset.id.desc()).limit(limit)
    if owner_id is not None:
        query = query.where(Dataset.owner_id == owner_id)
    if before is not None:
        query = query.where(Dataset.id < before)
    return session.scalars(query).all()
