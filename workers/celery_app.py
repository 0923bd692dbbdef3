"""Define the Celery application of the workers.

A Celery message only wakes a worker; the jobs are in Postgres.
"""

import logging
import math
import mmap
import multiprocessing
import os
import shutil
import socket
import tempfile
import threading
import time
from typing import Any

from celery import Celery
from celery.signals import (
    after_setup_logger,
    after_setup_task_logger,
    worker_process_init,
    worker_process_shutdown,
    worker_ready,
    worker_shutdown,
    worker_shutting_down,
)
from kombu.utils import eventio

from app.config import get_settings
from app.db.session import session_factory
from app.fleet import repository as fleet
from app.http import logs
from app.jobs.dispatch import TRANSPORT_OPTIONS
from app.storage.library import delete_unused
from secateur.launch import die_with_parent
from workers import scratch, tracing
from workers.devices import device_memory, host_memory

log = logging.getLogger(__name__)

SWEEP_SECONDS = 60.0
"""Time between two searches for folders that killed attempts left behind."""

# While another process holds the pipe of a killed child, epoll keeps reporting the pipe, and the worker spins
# (celery #1845). poll does not report closed pipes.
eventio.epoll = None
# Otherwise the pool makes a folder for its shared memory, and a kill leaves that folder behind.
multiprocessing.current_process()._config["tempdir"] = tempfile.gettempdir()  # type: ignore[attr-defined]

app = Celery("secateur", broker=get_settings().broker_url, include=["workers.tasks"])
app.conf.update(
    broker_transport_options=TRANSPORT_OPTIONS,
    broker_connection_retry_on_startup=True,
    broker_connection_max_retries=None,
    # Acknowledge early: after a late acknowledgement Redis delivers a long job's message twice (celery #5935).
    task_acks_late=False,
    task_ignore_result=True,
    worker_prefetch_multiplier=1,
    worker_disable_prefetch=True,
    worker_cancel_long_running_tasks_on_connection_loss=False,
    worker_pool="prefork",
    worker_concurrency=1,
    worker_proc_alive_timeout=60.0,  # a forked process that reports later is killed; the default is 4 seconds
    worker_enable_remote_control=False,
    worker_send_task_events=False,
)

MAIN_PID = os.getpid()
WORKER_NAME = f"{socket.gethostname()}:{MAIN_PID}"
shutting_down = mmap.mmap(-1, 1)
"""A byte that is shared with the forked process that supervises a job.

The byte has no lock, because signal handlers set it.
"""
_ended = threading.Event()


@after_setup_logger.connect
@after_setup_task_logger.connect
def _format_logs(logger: logging.Logger, **_: Any) -> None:
    logs.adopt(logger.handlers, get_settings())


@worker_shutting_down.connect
def _pass_on_shutdown(**_: Any) -> None:
    shutting_down[0] = 1


@worker_process_init.connect
def _begin_child(**_: Any) -> None:
    die_with_parent(MAIN_PID)
    session_factory.cache_clear()  # a forked process must not use the main process's connections


@worker_process_shutdown.connect
def _end_child(**_: Any) -> None:
    tracing.close()


@worker_ready.connect
def _start_beating(**_: Any) -> None:
    threading.Thread(target=_beat, daemon=True).start()


@worker_shutdown.connect
def _stop_beating(**_: Any) -> None:
    _ended.set()
    try:
        with session_factory()() as session:
            fleet.leave(session, WORKER_NAME)
    except Exception as error:
        log.warning("could not sign off: %s", error)


def _beat() -> None:
    """Write the heartbeat of this worker into the fleet table, whether the worker is idle or busy, and keep its disk clean."""
    settings = get_settings()
    info = {
        "devices": os.environ.get("CUDA_VISIBLE_DEVICES", "all"),
        "cpus": os.cpu_count(),
        "host_memory_bytes": host_memory(),
        "labels": settings.worker_labels,
        **device_memory(settings.max_child_memory_bytes),
    }
    settings.data_dir.mkdir(parents=True, exist_ok=True)
    swept = -math.inf
    while True:
        try:
            free = shutil.disk_usage(settings.data_dir).free
            with session_factory()() as session:
                fleet.beat(session, WORKER_NAME, "worker", {**info, "disk_free_bytes": free})
                if time.monotonic() - swept >= SWEEP_SECONDS:
                    scratch.delete_abandoned(session, settings)
                    delete_unused(settings)
                    swept = time.monotonic()
        except Exception as error:
            log.warning("could not beat: %s", error)
        if _ended.wait(settings.heartbeat_interval):
            return
