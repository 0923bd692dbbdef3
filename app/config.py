"""The service's settings: this module alone reads the service's environment variables (prefix ``SECATEUR_``)."""

import os
from base64 import b64decode, urlsafe_b64decode
from functools import lru_cache
from ipaddress import IPv4Network, IPv6Network
from pathlib import Path
from typing import Annotated, Any, Literal

from limits import parse
from pydantic import AfterValidator, BeforeValidator, Field, SecretStr, StringConstraints
from pydantic_settings import NoDecode, SettingsConfigDict
from sqlalchemy import make_url
from sqlalchemy.exc import ArgumentError

from secateur.settings import LibrarySettings

SECRETS_DIR = "SECATEUR_SECRETS_DIR"
"""Environment variable that names a folder of secret files, such as those of Docker and Kubernetes.

Each file has the name of the variable that it sets. An environment variable takes precedence over its file.
"""
DATABASE_URL_FILE = "database-url"
"""Name of the file in the data folder that holds the URL of the database that ``secateur up`` runs there."""
MISSED_BEATS = 3

Origin = Annotated[str, StringConstraints(pattern=r"^(\*|https?://[^/\s@]+)$")]
"""An origin as browsers send it (RFC 6454): scheme, host and port without a slash at the end; or ``*``."""


def _listed(value: Any) -> Any:
    """Split an environment variable's comma-separated text (``a,b``) into a list."""
    return [item.strip() for item in value.split(",") if item.strip()] if isinstance(value, str) else value


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


class Settings(LibrarySettings):
    """Everything that an operator can set. Durations are in seconds. Folders are created on first use."""

    model_config = SettingsConfigDict(
        env_prefix="SECATEUR_",
        secrets_dir=os.environ.get(SECRETS_DIR),
        populate_by_name=True,
        hide_input_in_errors=True,
    )

    database_url: Annotated[str, AfterValidator(_postgres_url)] = (
        "postgresql+psycopg://secateur:secateur@localhost:5432/secateur"
    )
    broker_url: str = "redis://localhost:6379/0"
    # data_dir also holds ``jobs/`` (step checkpoints and artifacts), ``statistics/`` (statistics of earlier jobs'
    # models) and, under ``secateur up``, the servers' files and ``database-url``.
    hub_dir: Path | None = None
    """Folder, laid out like a Hub cache, to which models are published instead of a Hugging Face Hub."""

    secret_keys: Annotated[SecretStr, AfterValidator(_fernet_keys)] | None = None
    """Fernet keys that encrypt the Hub tokens of API keys and jobs: each is 32 random bytes in URL-safe base64, the
    newest comes first, and commas separate them. If this is unset, the service refuses requests that bring a token."""

    lease_ttl: float = 60.0
    heartbeat_interval: float = 10.0
    lease_margin: float = 15.0
    """Number of seconds before the end of a lease by which its runner is stopped."""
    scheduler_interval: float = 1.0
    redispatch_after: float = 60.0
    max_failures: int = 3
    retry_backoff: float = 5.0
    """Wait before the second attempt at a failed job; every further failure doubles the wait."""
    stall_timeout: float = 1800.0
    """Time without a report after which a runner counts as hung."""
    idempotency_ttl: float = 86_400.0
    rate_limit: Annotated[str, AfterValidator(_rate)] = "6000/minute"
    """Limit on requests for each API key: ``N/second``, ``N/minute``, ``N/hour`` or ``N/day``; empty means no limit."""
    max_open_jobs: int | None = Field(1000, ge=1)
    """Largest number of jobs of one API key that have not ended."""
    max_waiting: int = Field(100, ge=1)
    """Largest number of event streams and of requests that wait for a job, of one API key in one API process."""
    max_running_jobs: int | None = Field(None, ge=1)
    """Largest number of jobs of one API key that workers run at the same time."""
    max_runtime_seconds: float | None = Field(None, gt=0)
    """Longest duration of one run of a job, even if the request allows a longer one."""
    max_model_parameters: int | None = Field(None, ge=1)
    retention: float | None = Field(None, gt=0)
    """Time after a job's end at which its artifacts and checkpoints are deleted; ``None`` keeps them until the job is
    deleted."""
    webhook_secret: Annotated[SecretStr, AfterValidator(_signing_secret)] | None = None
    """Secret that signs webhooks: ``whsec_`` and 24 to 64 bytes in base64 (Standard Webhooks). If this is unset, the
    service refuses requests that name a ``webhook_url``."""
    webhook_networks: Annotated[tuple[IPv4Network | IPv6Network, ...], NoDecode, BeforeValidator(_listed)] = ()
    """Networks that webhooks may be sent to although they are not public, such as ``10.0.0.0/8,fd00::/8``."""
    max_body_bytes: int = Field(64 * 2**20, ge=1)
    """Largest size of a request's body; calibration and evaluation texts make requests large."""
    cors_origins: Annotated[tuple[Origin, ...], NoDecode, BeforeValidator(_listed)] = ()
    """Origins whose pages may call the API, such as ``https://tools.example.org,https://ml.example.org``; ``*`` allows
    all origins."""
    docs: bool = True
    """Whether to serve ``/docs``, ``/redoc`` and ``/openapi.json``."""
    dashboard: bool = True
    """Whether to serve the web page at ``/``."""
    log_format: Literal["text", "json"] = "text"
    torch_threads: int | None = None
    """Number of threads that torch uses in a runner; if unset, torch uses one thread for each core of the machine."""

    @property
    def worker_silence(self) -> float:
        """The number of seconds without a heartbeat after which a worker counts as lost."""
        return MISSED_BEATS * self.heartbeat_interval

    @property
    def jobs_dir(self) -> Path:
        return self.data_dir / "jobs"

    def nearest_database_url(self) -> str:
        """Return ``database_url`` if it is set.

        Otherwise return the URL of the database that ``secateur up`` runs on this data folder, if the folder's
        ``database-url`` file exists; if it does not, return the default of ``database_url``.
        """
        file = self.data_dir / DATABASE_URL_FILE
        if "database_url" in self.model_fields_set or not file.is_file():
            return self.database_url
        return file.read_text().strip()

    def job_dir(self, job_id: object) -> Path:
        """Return the folder of one job's step checkpoints and artifacts, which workers and the API share."""
        return self.jobs_dir / str(job_id)


@lru_cache
def get_settings() -> Settings:
    """Return the process's settings; the environment is read once."""
    return Settings()
