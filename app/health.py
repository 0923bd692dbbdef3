"""Routes for liveness, readiness and metrics, which orchestrators and Prometheus call without an API key."""

from collections.abc import Callable
from enum import StrEnum
from typing import Annotated

import redis
from fastapi import APIRouter, Query, Request, Response
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest
from pydantic import BaseModel, Field
from sqlalchemy import text
from sqlalchemy.exc import SQLAlchemyError

from app.config import Settings
from app.db.session import reading, session_factory
from app.deps import SettingsDep
from app.fleet import repository as fleet
from app.http.problem import documented
from app.jobs import repository as jobs
from app.storage.service import NotJoined, StorageMismatch, check
from app.storage.store import open_store
from secateur.contract.errors import PruningError

router = APIRouter(tags=["health"])

BROKER_TIMEOUT = 1.0


class Health(BaseModel):
    """The answer of a running process."""

    status: str = "ok"


class Part(StrEnum):
    """What a job needs beside the API."""

    DATABASE = "database"
    BROKER = "broker"
    WORKERS = "workers"
    SCHEDULER = "scheduler"
    STORAGE = "storage"


class Readiness(BaseModel):
    """The status of each dependency: ``ok``, or a description of the failure."""

    ready: bool
    database: str = Field(examples=["ok"])
    broker: str = Field(examples=["ok"])
    workers: str = Field(examples=["ok"])
    scheduler: str = Field(examples=["ok"])
    storage: str = Field(examples=["ok"])
    unheld_jobs: int | None = Field(
        None, description="Queued jobs that no live worker can hold; null: the database does not answer."
    )


@router.get("/healthz")
async def healthz() -> Health:
    """Report whether this process answers. The answer says nothing about the services that the process depends on."""
    return Health()


@router.get("/readyz", response_model=Readiness, responses={503: {"model": Readiness}, **documented(422)})
def readyz(
    response: Response,
    settings: SettingsDep,
    exclude: Annotated[list[Part], Query(description="Parts that are reported, but do not count.")] = [],  # noqa: B006
) -> Readiness:
    """Report whether a job could run: database, broker and storage answer, and a worker and a scheduler are live.

    The API itself needs the database alone, so a proxy that asks whether to send requests here excludes the others.
    """
    verdicts = {
        Part.DATABASE: _verdict(lambda: _ask_database()),
        Part.BROKER: _verdict(lambda: _ask_broker(settings)),
        Part.WORKERS: _verdict(lambda: _ask_fleet(settings, "worker")),
        Part.SCHEDULER: _verdict(lambda: _ask_fleet(settings, "scheduler")),
        Part.STORAGE: _verdict(lambda: _ask_storage(settings)),
    }
    ready = all(verdict == "ok" for part, verdict in verdicts.items() if part not in exclude)
    response.status_code = 200 if ready else 503
    unheld = _count_unheld(settings) if verdicts[Part.DATABASE] == "ok" else None
    return Readiness(ready=ready, unheld_jobs=unheld, **verdicts)


class Unready(Exception):
    """A dependency is not ready; the message gives the reason."""


def _verdict(ask: Callable[[], None]) -> str:
    """Return ``ok``, or the kind of failure; the answer never contains addresses or credentials."""
    try:
        ask()
    except Unready as error:
        return str(error)
    except (SQLAlchemyError, redis.RedisError, OSError) as error:
        return f"unreachable ({type(error).__name__})"
    return "ok"


def _ask_database() -> None:
    with session_factory()() as session:
        session.execute(text("SELECT 1"))


def _ask_broker(settings: Settings) -> None:
    limits = {"socket_timeout": BROKER_TIMEOUT, "socket_connect_timeout": BROKER_TIMEOUT}
    with redis.Redis.from_url(settings.broker_url, **limits) as client:
        client.ping()


def _ask_fleet(settings: Settings, kind: str) -> None:
    with session_factory()() as session:
        if not fleet.live(session, settings.worker_silence, kind):
            raise Unready(f"no live {kind}")


def _ask_storage(settings: Settings) -> None:
    try:
        with reading() as session:
            check(session, open_store(settings))
    except NotJoined:
        return  # the first worker marks the store
    except StorageMismatch:
        raise Unready("not the storage of the workers") from None
    except PruningError as error:
        raise Unready(error.message) from None


def _count_unheld(settings: Settings) -> int | None:
    try:
        with reading() as session:
            return jobs.count_unheld(session, fleet.offers(session, settings.worker_silence))
    except SQLAlchemyError:
        return None


@router.get("/metrics", response_class=Response)
def metrics(request: Request) -> Response:
    """Return the service's metrics in the Prometheus text format."""
    registry: CollectorRegistry = request.app.state.registry
    return Response(generate_latest(registry), media_type=CONTENT_TYPE_LATEST)
