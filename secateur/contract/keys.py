"""The bodies of the requests and responses of ``/v1/keys`` and ``/v1/usage``, and the scopes of API keys."""

import datetime as dt
import re
import uuid
from enum import StrEnum
from typing import Annotated

from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, SecretStr, StringConstraints

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
    allows managing all keys, and reading, controlling and deleting the jobs of all keys.
    """

    READ = "read"
    SUBMIT = "submit"
    ADMIN = "admin"


USER = (Scope.READ, Scope.SUBMIT)


def check_namespace(namespace: str) -> str:
    """Return ``namespace`` if repositories of a Hub can be in it.

    Raises:
        ValueError: No repository can have this namespace.
    """
    try:
        validate_repo_id(f"{namespace}/name")
    except HFValidationError as error:
        raise ValueError(f"no namespace: {error}") from None
    return namespace


Namespace = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9._-]{1,42}$"), AfterValidator(check_namespace)]
MostJobs = Annotated[int, Field(ge=1, le=1_000_000)]


class _Request(BaseModel):
    model_config = ConfigDict(extra="forbid")


class KeySettings(_Request):
    """What an operator sets for an API key. A field that is left out keeps its value; a new key has the defaults."""

    namespace: Namespace | None = Field(
        None,
        description="Namespace of the repositories that the key's jobs publish by default, and the only one that they may "
        "write with the service's Hub token or in its Hub folder. Null or unset for a new key: one that no other key has.",
    )
    lend_hub_token: bool = Field(
        False, description="Whether requests and jobs of the key that bring no Hub token use the service's."
    )
    max_open_jobs: MostJobs | None = Field(
        None, description="Largest number of the key's jobs that have not ended; null: `SECATEUR_MAX_OPEN_JOBS`."
    )
    max_running_jobs: MostJobs | None = Field(
        None, description="Largest number of the key's jobs that run at once; null: `SECATEUR_MAX_RUNNING_JOBS`."
    )


class NewKey(KeySettings):
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
    namespace: str
    lend_hub_token: bool
    max_open_jobs: int | None
    max_running_jobs: int | None
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


class DayOfUsage(BaseModel):
    """What one API key used on one day (UTC). Deleting a job does not change the figures."""

    model_config = ConfigDict(from_attributes=True)

    key_id: uuid.UUID
    day: dt.date
    jobs_created: int
    jobs_succeeded: int
    jobs_failed: int
    worker_seconds: float = Field(
        description="Seconds for which workers owned the key's jobs, by the day on which they gave the jobs up."
    )
    bytes_stored: int = Field(description="Bytes of the files that the key's jobs stored on this day.")


class UsageList(BaseModel):
    """The usage by API key and day, newest day first; days without usage are left out."""

    items: list[DayOfUsage]
