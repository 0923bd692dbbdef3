"""A worker without Celery: ``python -m tests.workers.one_attempt JOB_ID``, ended gracefully by SIGTERM."""

import logging
import signal
import sys
import threading
import uuid

from app.config import get_settings
from app.db.session import session_factory
from workers.supervisor import supervise

if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO)
    ended = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: ended.set())
    runner = [sys.executable, "-m", "tests.workers.standin"]
    supervise(uuid.UUID(sys.argv[1]), get_settings(), session_factory(), "test", ended.is_set, runner)
