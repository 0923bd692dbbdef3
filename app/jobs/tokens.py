"""The Hub token that a job reads its model and publishes with: its own, else its key's, else the service's."""

import uuid

from pydantic import SecretStr
from sqlalchemy import select
from sqlalchemy.orm import Session

from app.auth import vault
from app.auth.models import ApiKey
from app.config import Settings
from app.http.problem import invalid
from app.jobs.models import Job
from secateur.contract.errors import ErrorCode


def keep(settings: Settings, own: SecretStr | None) -> bytes | None:
    """What may be stored of the token that a request brings.

    Raises:
        Problem: 422, this service cannot keep tokens.
    """
    try:
        return None if own is None else vault.encrypt(settings, own)
    except vault.VaultError as error:
        raise invalid("hub_token", str(error), code=ErrorCode.HUB_TOKENS_DISABLED) from None


def for_request(session: Session, settings: Settings, owner_id: uuid.UUID, own: SecretStr | None) -> SecretStr | None:
    """The token that a request of this key is served with.

    Raises:
        VaultError: the key's cannot be read.
    """
    if own is not None:
        return own
    stored = session.scalar(select(ApiKey.hub_token).where(ApiKey.id == owner_id))
    return settings.hf_token if stored is None else vault.decrypt(settings, stored)


def of_job(session: Session, settings: Settings, job_id: uuid.UUID) -> SecretStr | None:
    """The token that a worker does the job with.

    Raises:
        VaultError: it cannot be read.
    """
    query = select(Job.hub_token, Job.owner_id).where(Job.id == job_id)
    stored, owner_id = session.execute(query).one()
    own = None if stored is None else vault.decrypt(settings, stored)
    return for_request(session, settings, owner_id, own)
