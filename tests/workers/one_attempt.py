"""A worker without Celery: ``python -m tests.workers.one_attempt JOB_ID``. SIGTERM ends it gracefully, SIGUSR1 shortens its leases."""

import logging
import signal
import sys
import threading
import uuid

from app.config import get_settings
from app.db.session import session_factory
from tests.workers.standin import SHORT_LEASE
from workers.supervisor import supervise

if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO)
    ended = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: ended.set())
    settings = get_settings()
    signal.signal(signal.SIGUSR1, lambda *_: vars(settings).update(SHORT_LEASE))
    runner = [sys.executable, "-m", "tests.workers.standin"]
    supervise(uuid.UUID(sys.argv[1]), settings, session_factory(), "test", ended.is_set, runner)
