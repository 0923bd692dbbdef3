"""The health checks of the roles, each against the process that it checks."""

import signal
import socket

import pytest
from sqlalchemy import func, update
from sqlalchemy.orm import Session

from app.config import Settings
from app.fleet import repository as fleet
from app.fleet.models import Worker
from tests.workers.conftest import Start, wait_for
from workers.embedded import free_port
from workers.health import Unhealthy, check
from workers.roles import Role

NOWHERE = "http://127.0.0.1:9"


def healthy(role: Role, settings: Settings, url: str = NOWHERE) -> bool:
    try:
        check(role, settings, url)
    except Unhealthy:
        return False
    return True


def test_a_scheduler_is_healthy_while_it_runs(settings: Settings, start: Start) -> None:
    assert not healthy(Role.SCHEDULER, settings)
    scheduler = start("workers", "scheduler")
    wait_for(lambda: healthy(Role.SCHEDULER, settings))
    assert not healthy(Role.WORKER, settings)
    scheduler.send_signal(signal.SIGTERM)
    assert scheduler.wait() == 0
    assert not healthy(Role.SCHEDULER, settings)


def test_a_worker_is_healthy_while_its_heartbeat_is_young(settings: Settings, session: Session) -> None:
    settings = settings.model_copy(update={"heartbeat_interval": 600.0})
    fleet.beat(session, "elsewhere:7", "worker", {})
    with pytest.raises(Unhealthy, match=rf"No worker on {socket.gethostname()} has sent a heartbeat"):
        check(Role.WORKER, settings, NOWHERE)
    fleet.beat(session, f"{socket.gethostname()}:7", "worker", {})
    assert check(Role.WORKER, settings, NOWHERE) == f"The worker {socket.gethostname()}:7 sends its heartbeat."
    session.execute(update(Worker).values(last_seen_at=func.now() - func.make_interval(0, 0, 0, 1)))
    session.commit()
    assert not healthy(Role.WORKER, settings)


def test_an_api_is_healthy_while_it_answers(settings: Settings, start: Start) -> None:
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    assert not healthy(Role.API, settings, url)
    start("uvicorn", "app.main:create_app", "--factory", "--port", port)
    wait_for(lambda: healthy(Role.API, settings, url))


def test_the_command_says_what_is_wrong(settings: Settings, start: Start) -> None:
    unreachable = settings.model_copy(update={"database_url": "postgresql+psycopg://x:hunter2@127.0.0.1:9/x"})
    with pytest.raises(Unhealthy, match="cannot be read from the database") as caught:
        check(Role.WORKER, unreachable, NOWHERE)
    assert "hunter2" not in str(caught.value)
    command = start("workers", "health", "worker", stderr=-1)
    _, told = command.communicate()
    assert command.returncode == 1 and b"has sent a heartbeat" in told and b"Traceback" not in told
    assert start("workers", "health", "database", stderr=-1).wait() == 2
