"""The service's settings: this module alone reads the service's environment variables (prefix ``SECATEUR_``)."""

import json
import os
import re
from base64 import b64decode, urlsafe_b64decode
from functools import lru_cache
from ipaddress import IPv4Network, IPv6Network
from pathlib import Path
from typing import Annotated, Any, Literal, Self
from urllib.parse import urlsplit

from limits import parse
from pydantic import AfterValidator, BeforeValidator, Field, SecretStr, StringConstraints, model_validator
from pydantic_settings import NoDecode, SettingsConfigDict
from sqlalchemy import make_url
from sqlalchemy.exc import ArgumentError

from secateur.catalog.request import LabelName, LabelValue
from secateur.settings import LibrarySettings

SECRETS_DIR = "SECATEUR_SECRETS_DIR"
"""Environment variable that names a folder of secret files, such as those of Docker and Kubernetes.

Each file has the name of the variable that it sets. An environment variable takes precedence over its file.
"""
STACK_FILES = {
    "database_url": "database-url",
    "broker_url": "broker-url",
    "secret_keys": "secret-key",
    "hub_dir": "hub-dir",
}
"""Settings of the service that ``secateur up`` runs, and the files in its data folder that hold them."""
API_URL_FILE = "api-url"
"""Name of the file in the data folder that holds the address of the API of ``secateur up``."""
DEFAULT_API_URL = "http://127.0.0.1:8000"
MISSED_BEATS = 3

Seconds = Annotated[float, Field(gt=0, le=10 * 365 * 86_400, allow_inf_nan=False)]
"""A duration of more than nothing and of at most ten years, which Postgres and Python can add to a date."""

Origin = Annotated[str, StringConstraints(pattern=r"^(\*|https?://[^/\s@]+)$")]
"""An origin as browsers send it (RFC 6454): scheme, host and port without a slash at the end; or ``*``."""


def _listed(value: Any) -> Any:
    """Split an environment variable's comma-separated text (``a,b``) into a list."""
    return [item.strip() for item in value.split(",") if item.strip()] if isinstance(value, str) else value


def _named(value: Any) -> Any:
    """Split an environment variable's text of names and values (``a=1,b=2``) into a dictionary."""
    if not isinstance(value, str):
        return value
    items = [item.partition("=") for item in _listed(value)]
    if not all(equals for _, equals, _ in items):
        raise ValueError("labels are 'NAME=VALUE', with commas between")
    return {name.strip(): content.strip() for name, _, content in items}


def _signing_secret(secret: SecretStr) -> SecretStr:
    kind, _, key = secret.get_secret_value().partition("_")
    try:
        size = len(b64decode(key, validate=True)) if kind == "whsec" else 0
    except ValueError:
        size = 0
    if not 24 <= size <= 64:
        raise ValueError("a webhook secret is 'whsec_' and 24 to 64 random bytes in base64")
    return secret


def _fernet_keys(secret: SecretStr) -> SecretStr:
    try:
        sizes = {len(urlsafe_b64decode(key)) for key in secret.get_secret_value().split(",")}
    except ValueError:
        sizes = set()
    if sizes != {32}:
        raise ValueError("secret keys are 32 random bytes each, in URL-safe base64, with commas between")
    return secret


def _rate(rate: str) -> str:
    try:
        if rate:
            parse(rate)
    except ValueError:
        raise ValueError("a rate is, for instance, '100/second' or '6000/minute', or empty") from None
    return rate


def _postgres_url(url: str) -> str:
    try:
        known = make_url(url).drivername in ("postgresql", "postgresql+psycopg")
    except (ArgumentError, ValueError):
        known = False
    if not known:
        raise ValueError("a database URL is 'postgresql+psycopg://USER:PASSWORD@HOST:PORT/NAME'")
    return url


def _broker_url(url: str) -> str:
    if not re.match(r"rediss?://[^/]", url):
        raise ValueError("a broker URL is 'redis://:PASSWORD@HOST:PORT/0', or 'rediss://…' with TLS")
    return url


def _storage_url(url: str) -> str:
    parts = urlsplit(url)
    if parts.scheme == "file":
        known = parts.netloc in ("", "localhost") and parts.path.startswith("/") and parts.path != "/"
    else:
        known = parts.scheme in ("s3", "gs", "az") and bool(parts.netloc)
    if not known:
        allowed = "'s3://BUCKET/PREFIX', 'gs://BUCKET/PREFIX', 'az://CONTAINER/PREFIX' or 'file:///FOLDER'"
        raise ValueError(f"a storage URL is {allowed}")
    return url


def _server_url(url: str) -> str:
    try:
        parts = urlsplit(url)
        known = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
        known = known and not (parts.query or parts.fragment)
    except ValueError:
        known = False
    if not known:
        raise ValueError("the address of a server is 'http://HOST:PORT' or 'https://HOST/PATH'")
    return url.rstrip("/")


def _json_object(secret: SecretStr) -> SecretStr:
    try:
        known = isinstance(json.loads(secret.get_secret_value()), dict)
    except ValueError:
        known = False
    if not known:
        raise ValueError("""storage options are a JSON object, such as {"endpoint": "https://…"}""")
    return secret


class Settings(LibrarySettings):
    """Everything that an operator can set. Durations are in seconds. Folders are created on first use.

    Settings that contradict each other are refused.
    """

    model_config = SettingsConfigDict(
        env_prefix="SECATEUR_",
        secrets_dir=os.environ.get(SECRETS_DIR),
        populate_by_name=True,
        hide_input_in_errors=True,
    )

    database_url: Annotated[str, AfterValidator(_postgres_url)] = (
        "postgresql+psycopg://secateur:secateur@localhost:5432/secateur"
    )
    broker_url: Annotated[str, AfterValidator(_broker_url)] = "redis://localhost:6379/0"
    # data_dir also holds ``work/`` (the files of attempts while they run), ``statistics/`` (statistics of earlier jobs'
    # models) and, under ``secateur up``, the servers' files and :data:`STACK_FILES`. Machines need not share data_dir.
    storage_url: Annotated[str, AfterValidator(_storage_url)] | None = None
    """Object store of the artifacts and of the checkpoints' tensors: ``s3://BUCKET/PREFIX``, ``gs://BUCKET/PREFIX``,
    ``az://CONTAINER/PREFIX`` or ``file:///FOLDER``, which every process of the service must reach; if it is unset, the
    folder ``storage`` in the data folder."""
    storage_options: Annotated[SecretStr, AfterValidator(_json_object)] | None = None
    """Options of the object store as a JSON object, such as ``{"endpoint": "https://…", "region": "…"}``; the provider's
    own environment variables, such as ``AWS_ACCESS_KEY_ID``, are read as well."""
    storage_redirect: bool = True
    """Whether downloads of artifacts are redirected to signed URLs of the object store; otherwise the API streams the
    files. A ``file://`` store has no signed URLs."""
    hub_dir: Path | None = None
    """Folder, laid out like a Hub cache, to which models are published instead of a Hugging Face Hub."""

    secret_keys: Annotated[SecretStr, AfterValidator(_fernet_keys)] | None = None
    """Fernet keys that encrypt the Hub tokens of API keys and jobs: each is 32 random bytes in URL-safe base64, the
    newest comes first, and commas separate them. If this is unset, the service refuses requests that bring a token."""

    lease_ttl: Seconds = 60.0
    heartbeat_interval: Seconds = 10.0
    lease_margin: Seconds = 15.0
    """Number of seconds before the end of a lease by which its runner is stopped."""
    scheduler_interval: Seconds = 1.0
    max_failures: int = Field(3, ge=1)
    """Number of failed attempts without a completed step between them at which a job fails."""
    max_losses: int = Field(10, ge=1)
    """Number of attempts without a completed step between them whose worker was lost at which a job fails."""
    publish_patience: float = Field(6 * 3600.0, ge=0, allow_inf_nan=False)
    """Time for which a job whose model is ready tries again while the Hub does not answer."""
    retry_backoff: float = Field(5.0, ge=0, allow_inf_nan=False)
    """Wait before the second attempt at a failed job; every further failure doubles the wait."""
    stall_timeout: Seconds = 1800.0
    """Time without a report after which a runner counts as hung."""
    idempotency_ttl: Seconds = 86_400.0
    rate_limit: Annotated[str, AfterValidator(_rate)] = "6000/minute"
    """Limit on requests for each API key: ``N/second``, ``N/minute``, ``N/hour`` or ``N/day``; empty means no limit."""
    max_open_jobs: int | None = Field(1000, ge=1)
    """Largest number of jobs of one API key that have not ended."""
    max_waiting: int = Field(100, ge=1)
    """Largest number of event streams and of requests that wait for a job, of one API key in one API process."""
    max_running_jobs: int | None = Field(None, ge=1)
    """Largest number of jobs of one API key that workers run at the same time."""
    max_runtime_seconds: Seconds | None = None
    """Longest duration of one run of a job, even if the request allows a longer one."""
    max_model_parameters: int | None = Field(None, ge=1)
    checkpoint_retention: Seconds = 7 * 86_400.0
    """Time after a job's end at which its checkpoints are deleted, from which a failed or cancelled job can resume. A
    change holds for jobs that end afterwards."""
    artifact_retention: Seconds = 30 * 86_400.0
    """Time after a job's end at which its artifacts are deleted if they were published. Artifacts that were never
    published stay until the job is deleted."""
    max_stored_bytes: int | None = Field(None, ge=1)
    """Largest number of bytes that the artifacts and kept steps of one API key's jobs and the key's data sets may have
    together; a key that has reached the number can create no more jobs and upload nothing until it deletes some, and its
    jobs keep no more steps."""
    max_child_memory_bytes: int | None = Field(None, ge=1)
    """Largest amount of memory that the child process of a job and its own children use; ``None`` is the memory of the
    machine or of the container. Mapped files do not count."""
    max_job_disk_bytes: int | None = Field(None, ge=1)
    """Largest size of a job's folder, and of any single file that a child process of a job writes."""
    webhook_secret: Annotated[SecretStr, AfterValidator(_signing_secret)] | None = None
    """Secret that signs webhooks: ``whsec_`` and 24 to 64 bytes in base64 (Standard Webhooks). If this is unset, the
    service refuses requests that name a ``webhook_url``."""
    webhook_networks: Annotated[tuple[IPv4Network | IPv6Network, ...], NoDecode, BeforeValidator(_listed)] = ()
    """Networks that webhooks may be sent to although they are not public, such as ``10.0.0.0/8,fd00::/8``."""
    max_body_bytes: int = Field(64 * 2**20, ge=1)
    """Largest size of a request's body; calibration and evaluation texts make requests large."""
    max_dataset_bytes: int = Field(256 * 2**20, ge=1)
    """Largest size of a data set that a client uploads."""
    cors_origins: Annotated[tuple[Origin, ...], NoDecode, BeforeValidator(_listed)] = ()
    """Origins whose pages may call the API, such as ``https://tools.example.org,https://ml.example.org``; ``*`` allows
    all origins."""
    docs: bool = True
    """Whether to serve ``/docs``, ``/redoc`` and ``/openapi.json``."""
    dashboard: bool = True
    """Whether to serve the web page at ``/``."""
    log_format: Literal["text", "json"] = "text"
    otlp_endpoint: Annotated[str, AfterValidator(_server_url)] | None = None
    """Address of an OpenTelemetry collector, such as ``http://collector:4318``, to which traces are sent by OTLP/HTTP; it
    needs the extra ``telemetry``. If this is unset, there are no traces."""
    mlflow_tracking_uri: Annotated[str, AfterValidator(_server_url)] | None = None
    """Address of an MLflow tracking server, such as ``http://user:password@mlflow:5000``, which gets each job as a run. If
    this is unset, nothing is tracked."""
    worker_labels: Annotated[dict[LabelName, LabelValue], NoDecode, BeforeValidator(_named)] = {}
    """Labels that the workers of this machine announce, such as ``gpu=h100,zone=a``; a job may require labels."""
    database_pool: int = Field(19, ge=1)
    """Largest number of database connections that a process keeps for its threads. A process of the API opens one more,
    on which it listens for changes of jobs."""
    torch_threads: int | None = Field(None, ge=1)
    """Number of threads that torch uses in a runner; if unset, torch uses one thread for each core of the machine."""

    @model_validator(mode="after")
    def _refuse_contradictions(self) -> Self:
        """Refuse settings of which one makes another one useless or harmful."""
        if self.lease_margin >= self.lease_ttl:
            raise ValueError(
                f"SECATEUR_LEASE_MARGIN ({self.lease_margin:g}) must be less than SECATEUR_LEASE_TTL ({self.lease_ttl:g}), "
                "because a runner is stopped that long before the end of its lease"
            )
        if self.heartbeat_interval >= self.lease_ttl - self.lease_margin:
            raise ValueError(
                f"SECATEUR_HEARTBEAT_INTERVAL ({self.heartbeat_interval:g}) must be less than SECATEUR_LEASE_TTL "
                f"({self.lease_ttl:g}) minus SECATEUR_LEASE_MARGIN ({self.lease_margin:g}), because a lease that is not renewed "
                "by then stops its runner"
            )
        if self.scheduler_interval > self.lease_ttl:
            raise ValueError(
                f"SECATEUR_SCHEDULER_INTERVAL ({self.scheduler_interval:g}) must not exceed SECATEUR_LEASE_TTL "
                f"({self.lease_ttl:g}), because the scheduler looks for ended leases only once in an interval"
            )
        if self.max_running_jobs and self.max_open_jobs and self.max_running_jobs > self.max_open_jobs:
            raise ValueError(
                f"SECATEUR_MAX_RUNNING_JOBS ({self.max_running_jobs}) must not exceed SECATEUR_MAX_OPEN_JOBS "
                f"({self.max_open_jobs}), because a running job is open"
            )
        if self.webhook_networks and self.webhook_secret is None:
            raise ValueError(
                "SECATEUR_WEBHOOK_NETWORKS allows webhooks, but without SECATEUR_WEBHOOK_SECRET every webhook is refused"
            )
        if self.hub_dir is not None and self.hub_dir.resolve().is_relative_to(self.work_dir.resolve()):
            raise ValueError(
                f"SECATEUR_HUB_DIR ({self.hub_dir}) must not be in the folder 'work' of SECATEUR_DATA_DIR ({self.data_dir}), "
                "because the files of ended attempts are removed there"
            )
        return self

    @property
    def worker_silence(self) -> float:
        """The number of seconds without a heartbeat after which a worker or a scheduler counts as lost."""
        return MISSED_BEATS * self.heartbeat_interval

    @property
    def work_dir(self) -> Path:
        """The folder of the files of attempts while they run; it is on the worker's own disk."""
        return self.data_dir / "work"

    def nearest_storage_url(self) -> str:
        """Return ``storage_url`` if it is set, else the URL of the folder ``storage`` in the data folder."""
        return self.storage_url or (self.data_dir / "storage").resolve().as_uri()

    def nearest(self) -> Self:
        """Return these settings, with the values of the service that ``secateur up`` runs on this data folder.

        A setting that the environment names keeps its value. Settings whose file does not exist also do.
        """
        files = {name: self.data_dir / file for name, file in STACK_FILES.items() if name not in self.model_fields_set}
        found = {name: file.read_text().strip() for name, file in files.items() if file.is_file()}
        return type(self)(**self.model_dump(exclude_unset=True) | found) if found else self

    def nearest_api_url(self) -> str:
        """Return the address of the API of ``secateur up`` on this data folder, or the default address."""
        file = self.data_dir / API_URL_FILE
        return file.read_text().strip() if file.is_file() else DEFAULT_API_URL


@lru_cache
def get_settings() -> Settings:
    """Return the process's settings; the environment is read once."""
    return Settings()
