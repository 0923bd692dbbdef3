"""The real Celery application, whose children have a witness: ``celery -A tests.chaos.worker worker``."""

import sys
from functools import partial

from workers import tasks
from workers.celery_app import app

WITNESS = [sys.executable, "-m", "tests.chaos.witness"]
tasks.supervise = partial(tasks.supervise, runner=[*WITNESS, "runner"], publisher=[*WITNESS, "publisher"])

__all__ = ["app"]
