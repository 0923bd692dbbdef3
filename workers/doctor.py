"""Check everything that the service needs, and say what to do about what is missing: ``secateur doctor``."""

import importlib.metadata
import os
import platform
import shutil
import tempfile
import uuid
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any, Literal

import httpx2
import redis
from alembic.migration import MigrationContext
from huggingface_hub.errors import HfHubHTTPError
from sqlalchemy import Engine, NullPool, create_engine, text
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.orm import Session

from app import data_folder
from app.auth import vault
from app.config import Settings
from app.data_folder import DataFolderError
from app.db.migrate import newest_revision
from app.fleet import repository as fleet
from app.jobs import tokens
from app.storage.service import NotJoined, StorageMismatch, check
from app.storage.store import open_store
from secateur.catalog import hub_reads
from secateur.contract.errors import PruningError
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
    """Check each part in turn; an error in one check does not stop the other checks.

    Beside ``secateur up``, the parts are those of its service, see :meth:`app.config.Settings.nearest`.
    """
    settings = settings.nearest()
    parts: list[tuple[str, Callable[[Settings], Finding]]] = [
        ("database", _database),
        ("broker", _broker),
        ("API", _api),
        ("disk", _disk),
        ("storage", _storage),
        ("scheduler", _scheduler),
        ("workers", _workers),
        ("device", _device),
        ("llama.cpp", _llama_cpp),
        ("Hub", _hub),
        ("secrets", _secrets),
        ("tokens", _tokens),
        ("versions", _versions),
    ]
    for part, look in parts:
        try:
            yield look(settings)
        except Exception as error:  # an error in one check must not stop the others
            yield Finding(part, "failed", f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}")


def _database(settings: Settings) -> Finding:
    try:
        with _engine(settings).connect() as connection:
            version = connection.execute(text("SHOW server_version")).scalar_one()
            revision = MigrationContext.configure(connection).get_current_revision()
    except SQLAlchemyError as error:
        reason = str(getattr(error, "orig", error)).strip().splitlines()[0]
        return Finding(
            "database", "failed", reason, "set SECATEUR_DATABASE_URL, or start Postgres; 'secateur up' starts its own"
        )
    if revision != newest_revision():
        found = f"its schema is at {revision or 'nothing'}, this version's at {newest_revision()}"
        return Finding("database", "failed", found, "run 'secateur migrate', or install the version of the schema")
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


def _api(settings: Settings) -> Finding:
    url = settings.nearest_api_url()
    try:
        answer = httpx2.get(f"{url}/readyz", timeout=SECONDS, trust_env=False)
        ready = answer.json()
    except (httpx2.HTTPError, ValueError) as error:
        advice = "start 'secateur up' or the API; if the API is on another host, look at its /readyz"
        return Finding("API", "warning", f"none answers at {url} ({type(error).__name__})", advice)
    if answer.status_code != 200:
        lacking = ", ".join(f"{part}: {told}" for part, told in ready.items() if told not in (False, "ok"))
        return Finding("API", "warning", f"{url} is not ready ({lacking})", "see the parts that are named")
    return Finding("API", "ok", f"{url} is ready")


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
    try:
        data_folder.check(folder)
    except DataFolderError as error:
        return Finding("disk", "failed", str(error))
    free = shutil.disk_usage(folder).free
    found = f"{folder}: {free / 2**30:.1f} GiB free"
    if free < LITTLE_ROOM:
        return Finding("disk", "warning", found, "a job needs room for its model twice over, and for downloads")
    return Finding("disk", "ok", found)


def _storage(settings: Settings) -> Finding:
    """Write, read and delete an object of the store, and compare the store's mark with the database."""
    key, content = f"doctor/{uuid.uuid4()}", b"written by secateur doctor"
    try:
        store = open_store(settings)
        store.create(key, content)
        came = store.read(key, len(content))
        store.delete([key])
        if came != content:
            return Finding(
                "storage", "failed", f"{store.url} returns other bytes than were written", "look at the store"
            )
        with Session(_engine(settings)) as session:
            check(session, store)
    except OSError as error:
        return Finding("storage", "failed", f"{settings.nearest_storage_url()}: {error}", "set SECATEUR_STORAGE_URL")
    except ValueError as error:
        return Finding("storage", "failed", str(error), "set SECATEUR_STORAGE_URL and SECATEUR_STORAGE_OPTIONS")
    except PruningError as error:
        return Finding(
            "storage", "failed", f"{error.message} {error.__cause__}", "look at the network and the credentials"
        )
    except NotJoined as error:
        return Finding("storage", "warning", f"{store.url} works; {error}", "start a worker or a scheduler")
    except StorageMismatch as error:
        return Finding("storage", "failed", str(error))
    except SQLAlchemyError:
        return Finding("storage", "warning", f"{store.url} works; without the database its mark is not checked")
    return Finding("storage", "ok", f"{store.url} works and is the service's")


def _engine(settings: Settings) -> Engine:
    return create_engine(settings.database_url, poolclass=NullPool, connect_args={"connect_timeout": SECONDS})


def _scheduler(settings: Settings) -> Finding:
    try:
        with Session(_engine(settings)) as session:
            live = fleet.live(session, settings.worker_silence, "scheduler")
    except SQLAlchemyError:
        return Finding("scheduler", "failed", "not known without the database")
    if not live:
        advice = "run 'secateur scheduler': until then lost workers are not noticed, and failed attempts not repeated"
        return Finding("scheduler", "warning", "none is alive", advice)
    return Finding("scheduler", "ok", ", ".join(scheduler.name for scheduler in live))


def _workers(settings: Settings) -> Finding:
    try:
        with Session(_engine(settings)) as session:
            live = fleet.live(session, settings.worker_silence)
    except SQLAlchemyError:
        return Finding("workers", "failed", "not known without the database")
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


def _llama_cpp(settings: Settings) -> Finding:
    if missing("gguf"):
        advice = "a worker on this machine needs it for GGUF files: pip install 'secateur[gguf]'"
        return Finding("llama.cpp", "warning", "not installed; jobs that ask for 'gguf' fail", advice)
    return Finding("llama.cpp", "ok", f"llama-cpp-python {_version('llama-cpp-python')}")


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


def _tokens(settings: Settings) -> Finding:
    """Check that the secret keys decrypt every Hub token that the database holds."""
    try:
        with Session(_engine(settings)) as session:
            stored = tokens.every(session)
    except SQLAlchemyError:
        return Finding("tokens", "failed", "not known without the database")
    lost = sum(not vault.readable(settings, token) for token in stored)
    if lost:
        advice = (
            "put the key that they were encrypted with behind the others in SECATEUR_SECRET_KEYS, or set them again"
        )
        return Finding("tokens", "failed", f"{lost} of {len(stored)} Hub tokens cannot be decrypted", advice)
    return Finding("tokens", "ok", f"{len(stored)} Hub tokens are stored, and all can be decrypted")


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
