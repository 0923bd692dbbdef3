"""The real Celery application, with the stand-in for a runner: ``celery -A tests.workers.celery_standin worker``."""

import sys
from functools import partial

from workers import tasks
from workers.celery_app import app

tasks.supervise = partial(tasks.supervise, runner=[sys.executable, "-m", "tests.workers.standin"])

__all__ = ["app"]
