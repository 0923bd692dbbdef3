"""The service's settings: the one place that reads the environment (prefix ``SECATEUR_``)."""

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
"""Names a folder of files that are named like the variables, as Docker's and Kubernetes' secrets are; variables go first."""
DATABASE_URL_FILE = "database-url"
"""In the data folder: the URL of the database that ``secateur up`` runs there."""
MISSED_BEATS = 3

Origin = Annotated[str, StringConstraints(pattern=r"^(\*|https?://[^/\s@]+)$")]
"""As browsers send it (RFC 6454): scheme, host and port, with no slash at the end; or ``*``."""


def _listed(value: Any) -> Any:
    """A list as the environment has it: ``a,b``."""
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
    """Everything an operator can set. Durations are seconds, paths are created on first use."""

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
    # data_dir also holds ``jobs/`` (step checkpoints, artifacts), ``statistics/`` (of earlier jobs' models) and, under
    # ``secateur up``, the servers' files and ``database-url``.
    hub_dir: Path | None = None
    """Publish into this folder, laid out like a Hub cache, instead of to a Hugging Face Hub."""

    secret_keys: Annotated[SecretStr, AfterValidator(_fernet_keys)] | None = None
    """Encrypt the Hub tokens of keys and jobs: Fernet keys, 32 random bytes in URL-safe base64 each, the newest first, with
    commas between. Unset: requests that bring a token are refused."""

    lease_ttl: float = 60.0
    heartbeat_interval: float = 10.0
    lease_margin: float = 15.0
    """The runner is dead this long before its lease ends."""
    scheduler_interval: float = 1.0
    redispatch_after: float = 60.0
    max_failures: int = 3
    retry_backoff: float = 5.0
    """Wait before attempt n+1 of a failed job: this, doubled with every failure."""
    stall_timeout: float = 1800.0
    """A runner that reports nothing for this long is taken for hung."""
    idempotency_ttl: float = 86_400.0
    rate_limit: Annotated[str, AfterValidator(_rate)] = "6000/minute"
    """Of requests, for each API key; ``N/second``, ``N/minute``, ``N/hour`` or ``N/day``. Empty: no limit."""
    max_open_jobs: int | None = Field(1000, ge=1)
    """Of each API key, jobs that have not ended."""
    max_running_jobs: int | None = Field(None, ge=1)
    """Of each API key, jobs that workers work on at the same time."""
    max_runtime_seconds: float | None = Field(None, gt=0)
    """Of one run of a job, whatever the request allows."""
    max_model_parameters: int | None = Field(None, ge=1)
    retention: float | None = Field(None, gt=0)
    """Artifacts and checkpoints of a job go this long after it has ended. None: when the job is deleted."""
    webhook_secret: Annotated[SecretStr, AfterValidator(_signing_secret)] | None = None
    """``whsec_`` and 24 to 64 bytes in base64 (Standard Webhooks); unset: requests that name a ``webhook_url`` are refused."""
    webhook_networks: Annotated[tuple[IPv4Network | IPv6Network, ...], NoDecode, BeforeValidator(_listed)] = ()
    """Networks that webhooks may go to although they are not public, as in ``10.0.0.0/8,fd00::/8``."""
    max_body_bytes: int = Field(64 * 2**20, ge=1)
    """Of a request. Calibration and evaluation texts are what makes one large."""
    cors_origins: Annotated[tuple[Origin, ...], NoDecode, BeforeValidator(_listed)] = ()
    """Origins whose pages may call the API, as in ``https://tools.example.org,https://ml.example.org``; ``*``: all."""
    docs: bool = True
    """Serve ``/docs``, ``/redoc`` and ``/openapi.json``."""
    dashboard: bool = True
    """Serve the web page at ``/``."""
    log_format: Literal["text", "json"] = "text"
    torch_threads: int | None = None
    """Threads a runner gives torch; unset: one for every core of the machine."""

    @property
    def worker_silence(self) -> float:
        """Seconds without a heartbeat after which a worker counts as gone."""
        return MISSED_BEATS * self.heartbeat_interval

    @property
    def jobs_dir(self) -> Path:
        return self.data_dir / "jobs"

    def nearest_database_url(self) -> str:
        """``database_url`` where it is set; else that of the ``secateur up`` on this data folder, if there was one."""
        file = self.data_dir / DATABASE_URL_FILE
        if "database_url" in self.model_fields_set or not file.is_file():
            return self.database_url
        return file.read_text().strip()

    def job_dir(self, job_id: object) -> Path:
        """Round checkpoints and artifacts of one job; shared between workers and the API."""
        return self.jobs_dir / str(job_id)


@lru_cache
def get_settings() -> Settings:
    """The process's settings, read once."""
    return Settings()
