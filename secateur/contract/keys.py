"""The bodies of the requests and responses of ``/v1/keys``, and the scopes of API keys."""

import datetime as dt
import re
import uuid
from enum import StrEnum
from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, SecretStr

GRACE = 86_400.0
LONGEST_GRACE = 30 * 86_400.0


def _visible(token: SecretStr) -> SecretStr:
    if not re.fullmatch(r"[\x21-\x7e]*", token.get_secret_value()):
        raise ValueError("a token has visible ASCII characters alone")
    return token


HubTokenText = Annotated[SecretStr, AfterValidator(_visible)]
"""A Hub token, which is sent in an HTTP header (RFC 6750, section 2.1)."""


class Scope(StrEnum):
    """A scope of an API key. No scope implies another.

    `read` allows reading the key's jobs and the catalogue, `submit` allows creating and controlling jobs, and `admin`
    allows managing all keys.
    """

    READ = "read"
    SUBMIT = "submit"
    ADMIN = "admin"


USER = (Scope.READ, Scope.SUBMIT)


class _Request(BaseModel):
    model_config = ConfigDict(extra="forbid")


class NewKey(_Request):
    """The request to create an API key."""

    name: Annotated[str, Field(min_length=1, max_length=200)] = Field(description="Whom or what it is for.")
    scopes: list[Scope] = Field([*USER], min_length=1, description="What it may do; none implies another.")


class Rotation(_Request):
    """The request to rotate an API key: the key gets a new secret."""

    grace_seconds: float = Field(
        GRACE, ge=0, le=LONGEST_GRACE, description="Seconds for which the current secret stays valid."
    )


class HubToken(_Request):
    """The request to set the Hub token that the jobs of an API key use."""

    hub_token: HubTokenText | None = Field(description="Null takes it away.", max_length=512)


class KeyView(BaseModel):
    """An API key without its secret."""

    model_config = ConfigDict(from_attributes=True)

    id: uuid.UUID
    name: str
    scopes: list[Scope]
    created_at: dt.datetime
    last_used_at: dt.datetime | None = Field(description="Right to the minute.")
    revoked_at: dt.datetime | None
    previous_expires_at: dt.datetime | None = Field(description="Time until which the previous secret stays valid.")


class KeyWithSecret(KeyView):
    """An API key with its secret. The service shows the secret only once."""

    secret: str


class KeyList(BaseModel):
    """All API keys, oldest first."""

    items: list[KeyView]
