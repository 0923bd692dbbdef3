"""The proof, when a worker or a scheduler starts, that it uses the same object store as the rest of the service."""

import logging
import time

from sqlalchemy.exc import InterfaceError, OperationalError
from sqlalchemy.orm import Session, sessionmaker

from app.config import Settings
from app.storage.service import join
from app.storage.store import open_store
from secateur.contract.errors import PruningError

log = logging.getLogger(__name__)

RETRY_SECONDS = 2.0


def join_storage(settings: Settings, sessions: sessionmaker[Session]) -> None:
    """Join the object store, and wait while the database or the store does not answer.

    Raises:
        StorageMismatch: this process does not use the same store as the others.
    """
    while True:
        try:
            with sessions() as session:
                return join(session, open_store(settings))
        except (OperationalError, InterfaceError, PruningError) as error:
            log.warning("waiting for the database and the storage: %s", str(error).splitlines()[0])
            time.sleep(RETRY_SECONDS)
