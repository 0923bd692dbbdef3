"""The declarative base and the column types that all tables share."""

import datetime as dt
import uuid
from typing import Any

import uuid_utils.compat
from sqlalchemy import DateTime, MetaData, Text
from sqlalchemy.dialects.postgresql import ARRAY, JSONB
from sqlalchemy.orm import DeclarativeBase


class Base(DeclarativeBase):
    """The declarative base of all tables; it fixes the names of constraints so that migrations can drop them."""

    metadata = MetaData(
        naming_convention={
            "ix": "ix_%(table_name)s_%(column_0_N_name)s",
            "uq": "uq_%(table_name)s_%(column_0_N_name)s",
            "ck": "ck_%(table_name)s_%(constraint_name)s",
            "fk": "fk_%(table_name)s_%(column_0_N_name)s_%(referred_table_name)s",
            "pk": "pk_%(table_name)s",
        }
    )
    type_annotation_map = {
        dt.datetime: DateTime(timezone=True),
        dict[str, Any]: JSONB(none_as_null=True),
        dict[str, str]: JSONB,
        list[str]: ARRAY(Text),
    }


def new_id() -> uuid.UUID:
    """Return a UUIDv7 (RFC 9562); UUIDv7 are ordered by creation time and therefore serve as the keyset of a page."""
    return uuid_utils.compat.uuid7()
