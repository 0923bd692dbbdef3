"""The Hub token with which a job reads its model and publishes: its own, else its API key's, else the service's.

The service's token is lent only to API keys that an operator allows to use it.
"""

import uuid
from collections.abc import Sequence
from dataclasses import dataclass

from pydantic import SecretStr
from sqlalchemy import select, union_all
from sqlalchemy.orm import Session

from app.auth import vault
from app.auth.models import ApiKey
from app.config import Settings
from app.http.problem import invalid
from app.jobs.models import Job
from secateur.contract.errors import ErrorCode


@dataclass(frozen=True)
class HubAccess:
    """What a request of an API key may read and write on the Hub."""

    token: SecretStr | None
    """The Hub token; ``None`` reads what is public."""
    namespace: str
    """The namespace of default repository names."""
    restricted: bool
    """Whether the key may write to ``namespace`` only, because it brings no token of its own."""


def keep(settings: Settings, own: SecretStr | None) -> bytes | None:
    """Return the token that a request brings in encrypted form, or ``None`` if the request brings none.

    Raises:
        Problem: 422 if this service cannot store tokens.
    """
    try:
        return None if own is None else vault.encrypt(settings, own)
    except vault.VaultError as error:
        raise invalid("hub_token", str(error), code=ErrorCode.HUB_TOKENS_DISABLED) from None


def for_request(session: Session, settings: Settings, owner_id: uuid.UUID, own: SecretStr | None) -> HubAccess:
    """Return the access to the Hub with which a request of this API key is served; ``own`` is the request's token.

    Raises:
        VaultError: the API key's stored token cannot be read.
    """
    query = select(ApiKey.hub_token, ApiKey.lend_hub_token, ApiKey.namespace).where(ApiKey.id == owner_id)
    stored, lent, namespace = session.execute(query).one()
    token = vault.decrypt(settings, stored) if own is None and stored is not None else own
    restricted = token is None or settings.hub_dir is not None
    return HubAccess(settings.hf_token if token is None and lent else token, namespace, restricted)


def every(session: Session) -> Sequence[bytes]:
    """Return the Hub tokens of all jobs and API keys, in encrypted form."""
    jobs = select(Job.hub_token).where(Job.hub_token.is_not(None))
    keys = select(ApiKey.hub_token).where(ApiKey.hub_token.is_not(None))
    return [token for token in session.scalars(union_all(jobs, keys)) if token is not None]


def of_job(session: Session, settings: Settings, job_id: uuid.UUID) -> SecretStr | None:
    """Return the Hub token with which a worker runs the job.

    Raises:
        VaultError: the stored token of the job or of its API key cannot be read.
    """
    query = select(Job.hub_token, Job.owner_id).where(Job.id == job_id)
    stored, owner_id = session.execute(query).one()
    own = None if stored is None else vault.decrypt(settings, stored)
    return for_request(session, settings, owner_id, own).token
