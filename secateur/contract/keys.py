"""What goes in and out of ``/v1/keys``, and what a key may do."""

import datetime as dt
import uuid
from enum import StrEnum
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, SecretStr

GRACE = 86_400.0
LONGEST_GRACE = 30 * 86_400.0


class Scope(StrEnum):
    """What a key may do: look at its jobs and at the catalogue, make and steer jobs, manage all keys. None implies another."""

    READ = "read"
    SUBMIT = "submit"
    ADMIN = "admin"


USER = (Scope.READ, Scope.SUBMIT)


class _Request(BaseModel):
    model_config = ConfigDict(extra="forbid")


class NewKey(_Request):
    """A key to make."""

    name: Annotated[str, Field(min_length=1, max_length=200)] = Field(description="Whom or what it is for.")
    scopes: list[Scope] = Field([*USER], min_length=1, description="What it may do; none implies another.")


class Rotation(_Request):
    """How to rotate a key."""

    grace_seconds: float = Field(GRACE, ge=0, le=LONGEST_GRACE, description="For which the secret it has serves on.")


class HubToken(_Request):
    """A Hub token for the jobs of a key."""

    hub_token: SecretStr | None = Field(description="Null takes it away.", max_length=512)


class KeyView(BaseModel):
    """A key, without its secret."""

    model_config = ConfigDict(from_attributes=True)

    id: uuid.UUID
    name: str
    scopes: list[Scope]
    created_at: dt.datetime
    last_used_at: dt.datetime | None = Field(description="Right to the minute.")
    revoked_at: dt.datetime | None
    previous_expires_at: dt.datetime | None = Field(description="Until when the secret before the last one serves.")


class KeyWithSecret(KeyView):
    """A key and its secret, which cannot be had again."""

    secret: str


class KeyList(BaseModel):
    """All keys, oldest first."""

    items: list[KeyView]
