"""Check everything that the service needs, and say what to do about what is missing: ``secateur doctor``."""

import importlib.metadata
import os
import platform
import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any, Literal

import httpx2
import redis
from alembic.migration import MigrationContext
from huggingface_hub.errors import HfHubHTTPError
from sqlalchemy import create_engine, text
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.orm import Session

from app.config import Settings
from app.db.migrate import newest_revision
from app.fleet import repository as fleet
from secateur.catalog import hub_reads
from secateur.extras import missing
from workers.devices import device_memory

SECONDS = 3
LITTLE_ROOM = 20 * 2**30
"""Bytes of free disk below which a large model does not fit."""
PACKAGES = ("torch", "transformers", "huggingface_hub", "fastapi", "celery", "sqlalchemy")

Verdict = Literal["ok", "warning", "failed"]


@dataclass(frozen=True)
class Finding:
    """The result of checking one part of the service; ``advice`` says what to do, if there is anything to do."""

    part: str
    verdict: Verdict
    found: str
    advice: str = ""

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def examine(settings: Settings) -> Iterator[Finding]:
    """Check each part in turn; an error in one check does not stop the other checks."""
    parts: list[tuple[str, Callable[[Settings], Finding]]] = [
        ("database", _database),
        ("broker", _broker),
        ("disk", _disk),
        ("workers", _workers),
        ("device", _device),
        ("Hub", _hub),
        ("secrets", _secrets),
        ("versions", _versions),
    ]
    for part, look in parts:
        try:
            yield look(settings)
        except Exception as error:  # an error in one check must not stop the others
            yield Finding(part, "failed", f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}")


def _database(settings: Settings) -> Finding:
    engine = create_engine(settings.nearest_database_url(), connect_args={"connect_timeout": SECONDS})
    try:
        with engine.connect() as connection:
            version = connection.execute(text("SHOW server_version")).scalar_one()
            revision = MigrationContext.configure(connection).get_current_revision()
    except SQLAlchemyError as error:
        reason = str(getattr(error, "orig", error)).strip().splitlines()[0]
        return Finding("database", "failed", reason, "set SECATEUR_DATABASE_URL, or start Postgres")
    finally:
        engine.dispose()
    if revision != newest_revision():
        found = f"its schema is at {revision or 'nothing'}, this version's at {newest_revision()}"
        return Finding("database", "failed", found, "run 'secateur migrate'")
    return Finding("database", "ok", f"Postgres {version}, schema {revision}")


def _broker(settings: Settings) -> Finding:
    try:
        limits = {"socket_timeout": SECONDS, "socket_connect_timeout": SECONDS}
        with redis.Redis.from_url(settings.broker_url, **limits) as client:
            version = client.info("server")["redis_version"]
    except (redis.RedisError, OSError) as error:
        advice = "set SECATEUR_BROKER_URL, or start Redis; jobs wait in the database meanwhile"
        return Finding("broker", "failed", str(error), advice)
    return Finding("broker", "ok", f"speaks Redis {version}")


def _disk(settings: Settings) -> Finding:
    folder = settings.data_dir.resolve()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        return Finding(
            "disk", "failed", f"{folder}: {error.strerror}", "set SECATEUR_DATA_DIR to a folder that can be written"
        )
    free = shutil.disk_usage(folder).free
    found = f"{folder}: {free / 2**30:.1f} GiB free"
    if free < LITTLE_ROOM:
        return Finding("disk", "warning", found, "a job needs room for its model twice over, and for downloads")
    return Finding("disk", "ok", found)


def _workers(settings: Settings) -> Finding:
    engine = create_engine(settings.nearest_database_url(), connect_args={"connect_timeout": SECONDS})
    try:
        with Session(engine) as session:
            live = fleet.live(session, settings.worker_silence)
    except SQLAlchemyError:
        return Finding("workers", "failed", "not known without the database")
    finally:
        engine.dispose()
    if not live:
        return Finding("workers", "warning", "none is alive", "run 'secateur worker': jobs wait until one does")
    return Finding(
        "workers", "ok", ", ".join(f"{worker.name} ({worker.info.get('device', 'unknown')})" for worker in live)
    )


def _device(settings: Settings) -> Finding:
    known = device_memory()
    memory = f"{known['memory_bytes'] / 2**30:.1f} GiB" if "memory_bytes" in known else "memory not known"
    if known["device"] == "cpu":
        advice = "models of billions of parameters want a GPU and its driver (nvidia-smi)"
        return Finding("device", "warning", f"no GPU here; {memory} of memory", advice)
    return Finding("device", "ok", f"GPU with {memory}")


def _hub(settings: Settings) -> Finding:
    if settings.hub_dir is not None:
        return Finding("Hub", "ok", f"models are published to {settings.hub_dir}")
    if settings.hf_token is None:
        advice = "set SECATEUR_HF_TOKEN, or have requests or keys bring their own"
        return Finding("Hub", "warning", "this service has no token", advice)
    try:
        me = hub_reads.whoami(settings.hf_endpoint, settings.hf_token.get_secret_value())
    except HfHubHTTPError as error:
        return Finding("Hub", "failed", f"it does not take the token ({error.response.status_code})", "make a new one")
    except (httpx2.HTTPError, OSError, ValueError) as error:
        return Finding(
            "Hub", "failed", f"it cannot be reached: {type(error).__name__}", "look at the network, HF_ENDPOINT"
        )
    return Finding("Hub", "ok", f"the token is {me['name']}'s")


def _secrets(settings: Settings) -> Finding:
    lacking = []
    if settings.secret_keys is None:
        lacking.append("SECATEUR_SECRET_KEYS (Hub tokens of requests and keys are refused)")
    if settings.webhook_secret is None:
        lacking.append("SECATEUR_WEBHOOK_SECRET (webhooks are refused)")
    if lacking:
        return Finding("secrets", "warning", f"not set: {', '.join(lacking)}", "see docs/operating.md, Settings")
    return Finding("secrets", "ok", "all set")


def _versions(settings: Settings) -> Finding:
    packages = [f"{name} {_version(name)}" for name in PACKAGES]
    found = f"Python {platform.python_version()}, {', '.join(packages)}, {os.cpu_count()} CPUs"
    if lacking := missing("engine"):
        advice = "a worker on this machine needs the engine: pip install 'secateur[engine]'"
        return Finding("versions", "warning", f"{found}; not installed: {', '.join(lacking)}", advice)
    return Finding("versions", "ok", found)


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "(not installed)"
