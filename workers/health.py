"""Check the health of the service's roles, for containers: ``python -m workers health api|worker|scheduler``.

The check of the API is its ``/healthz``. Workers and schedulers answer no requests, so their check reads the heartbeat
that the process itself writes into the fleet table. A database that does not answer therefore fails the check of both:
configure an orchestrator that restarts unhealthy containers to tolerate an outage of the database (see ``retries`` in
``docker-compose.yml``).
"""

import socket

import httpx2
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.orm import Session

from app.config import Settings
from app.db.session import make_engine
from app.fleet import repository as fleet
from workers.roles import Role

SECONDS = 5.0


class Unhealthy(Exception):
    """The process of the role does not do its work; the message says what was seen."""


def check(role: Role, settings: Settings, url: str) -> str:
    """Return one line about the healthy process of ``role`` on this host; ``url`` is the API's address.

    Raises:
        Unhealthy: the process does not answer, or its heartbeat is missing.
    """
    return _check_api(url) if role is Role.API else _check_heartbeat(role, settings)


def _check_api(url: str) -> str:
    try:
        answer = httpx2.get(f"{url}/healthz", timeout=SECONDS, trust_env=False)
    except (httpx2.HTTPError, httpx2.InvalidURL) as error:
        raise Unhealthy(f"The API at {url} does not answer: {type(error).__name__}.") from None
    if answer.status_code != 200:
        raise Unhealthy(f"The API at {url} answers with status {answer.status_code}.")
    return f"The API at {url} answers."


def _check_heartbeat(role: Role, settings: Settings) -> str:
    engine = make_engine(settings.nearest().database_url)
    try:
        with Session(engine) as session:
            live = fleet.live(session, settings.worker_silence, role.value)
    except SQLAlchemyError as error:
        reason = str(getattr(error, "orig", error)).strip().splitlines()[0]
        raise Unhealthy(f"The heartbeat of the {role} cannot be read from the database: {reason}") from None
    finally:
        engine.dispose()
    host = socket.gethostname()
    here = [process.name for process in live if process.name.rpartition(":")[0] == host]
    if not here:
        raise Unhealthy(f"No {role} on {host} has sent a heartbeat in the last {settings.worker_silence:.0f} seconds.")
    return f"The {role} {', '.join(here)} sends its heartbeat."
