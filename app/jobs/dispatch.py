"""The doorbell: a Celery message that says "look at this job". Losing one loses nothing: the scheduler rings again."""

import logging
import uuid
from functools import lru_cache

from celery import Celery
from kombu.exceptions import KombuError
from redis.exceptions import RedisError

from app.config import get_settings

log = logging.getLogger(__name__)

TASK = "secateur.ring"
TRANSPORT_OPTIONS = {"socket_timeout": 5, "socket_connect_timeout": 1, "retry_on_timeout": False}
"""Without these a broker that hangs blocks the caller for half a minute (celery #4296, kombu #1463)."""

ONCE = {"max_retries": 1, "interval_start": 0}
"""Without these a broker that refuses is asked again for six seconds."""


@lru_cache
def _client(broker_url: str) -> Celery:
    client = Celery(broker=broker_url, set_as_current=False)
    client.conf.update(
        broker_transport_options=TRANSPORT_OPTIONS | ONCE, task_ignore_result=True, task_publish_retry=False
    )
    return client


def wake_worker(job_id: uuid.UUID) -> None:
    """Ring once. Never raises: a failure is logged, and the scheduler makes up for it."""
    try:
        _client(get_settings().broker_url).send_task(TASK, args=[str(job_id)], ignore_result=True)
    except (KombuError, RedisError, OSError) as error:
        log.warning("doorbell for job %s did not ring: %s", job_id, error)
