"""Dispatch of jobs: a Celery message tells a worker to look for a job. A lost message loses no job: the scheduler wakes
a worker again."""

import logging
from functools import lru_cache

from celery import Celery
from kombu.exceptions import KombuError
from redis.exceptions import RedisError

from app.config import get_settings

log = logging.getLogger(__name__)

TASK = "secateur.work"
TRANSPORT_OPTIONS = {"socket_timeout": 5, "socket_connect_timeout": 1, "retry_on_timeout": False}
"""Timeouts of the broker connection; without them, a broker that hangs blocks the caller for half a minute (celery
#4296, kombu #1463)."""

ONCE = {"max_retries": 1, "interval_start": 0}
"""Retry limits of the broker connection; without them, a broker that refuses connections is retried for six seconds."""


@lru_cache
def _client(broker_url: str) -> Celery:
    client = Celery(broker=broker_url, set_as_current=False)
    client.conf.update(
        broker_transport_options=TRANSPORT_OPTIONS | ONCE, task_ignore_result=True, task_publish_retry=False
    )
    return client


def wake_worker() -> None:
    """Send one dispatch message, which wakes one worker that is idle or, if there is none, the next one that becomes so.

    This never raises: a failure is logged, and the scheduler sends again.
    """
    try:
        _client(get_settings().broker_url).send_task(TASK, ignore_result=True)
    except (KombuError, RedisError, OSError) as error:
        log.warning("a dispatch message could not be sent: %s", error)
