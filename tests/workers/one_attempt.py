"""A worker without Celery: ``python -m tests.workers.one_attempt JOB_ID``. SIGTERM ends it gracefully, SIGUSR1 shortens its leases."""

import logging
import signal
import sys
import threading
import time
import uuid

from app.config import get_settings
from app.db.session import session_factory
from app.jobs import leases
from tests.workers.standin import SHORT_LEASE
from workers.supervisor import supervise

if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO)
    ended = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: ended.set())
    settings = get_settings()
    signal.signal(signal.SIGUSR1, lambda *_: vars(settings).update(SHORT_LEASE))
    runner = [sys.executable, "-m", "tests.workers.standin"]
    claimed = time.monotonic()
    with session_factory()() as session:
        claim = leases.claim(session, uuid.UUID(sys.argv[1]), "test", settings.lease_ttl)
    if claim is not None:
        supervise(claim, claimed, settings, session_factory(), ended.is_set, runner)
