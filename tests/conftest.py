"""Real servers for every test: one Postgres and one Valkey a session, a fresh database a test."""

import itertools
from collections.abc import Iterator
from pathlib import Path

import psycopg
import pytest
import redis
from hypothesis import HealthCheck
from hypothesis import settings as hypothesis_settings
from sqlalchemy import make_url
from sqlalchemy.orm import Session

from app.config import Settings, get_settings
from app.db.session import session_factory
from app.jobs.service import offers_of
from tests.patience import make_http_requests_patient, patient_engine
from workers.embedded import Server, free_port, start_postgres, start_valkey

_numbers = itertools.count()
make_http_requests_patient()
hypothesis_settings.register_profile("busy machine", deadline=None, suppress_health_check=[HealthCheck.too_slow])
hypothesis_settings.load_profile("busy machine")


@pytest.fixture(scope="session")
def postgres(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    server = start_postgres(tmp_path_factory.mktemp("servers") / "postgres", free_port(), durable=False)
    yield server
    server.stop()


@pytest.fixture(scope="session")
def valkey(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    server = start_valkey(tmp_path_factory.mktemp("valkey"), free_port(), "secret")
    yield server
    server.stop()


def _execute(server: Server, statement: str) -> None:
    with psycopg.connect(server.url.replace("+psycopg", ""), autocommit=True) as connection:
        connection.execute(statement)


def _url(server: Server, database: str) -> str:
    return make_url(server.url).set(database=database).render_as_string(hide_password=False)


@pytest.fixture
def empty_database_url(postgres: Server) -> Iterator[str]:
    """A fresh database without tables."""
    name = f"empty_{next(_numbers)}"
    _execute(postgres, f"CREATE DATABASE {name}")
    yield _url(postgres, name)
    _execute(postgres, f"DROP DATABASE {name} WITH (FORCE)")


@pytest.fixture(scope="session")
def template_database(postgres: Server) -> str:
    """The name of a database that Alembic has brought up to date."""
    from app.db.migrate import upgrade

    _execute(postgres, "CREATE DATABASE template_migrated")
    upgrade(_url(postgres, "template_migrated"))
    return "template_migrated"


@pytest.fixture
def database_url(postgres: Server, template_database: str) -> Iterator[str]:
    """A fresh database with all tables."""
    name = f"test_{next(_numbers)}"
    _execute(postgres, f"CREATE DATABASE {name} TEMPLATE {template_database}")
    yield _url(postgres, name)
    _execute(postgres, f"DROP DATABASE {name} WITH (FORCE)")


@pytest.fixture
def broker_url(valkey: Server) -> str:
    """A broker without messages."""
    with redis.Redis.from_url(valkey.url) as client:
        client.flushall()
    return valkey.url


@pytest.fixture
def settings(database_url: str, broker_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Settings]:
    """The settings of this process and, through the environment, of every process it starts."""
    environment = {
        "DATABASE_URL": database_url,
        "BROKER_URL": broker_url,
        "DATA_DIR": str(tmp_path / "data"),
        "HUB_DIR": str(tmp_path / "hub"),
    }
    for name, value in environment.items():
        monkeypatch.setenv(f"SECATEUR_{name}", value)
    get_settings.cache_clear()
    session_factory.cache_clear()
    offers_of.cache_clear()
    yield get_settings()
    if session_factory.cache_info().currsize:
        session_factory().kw["bind"].dispose()
    get_settings.cache_clear()
    session_factory.cache_clear()


@pytest.fixture
def session(settings: Settings) -> Iterator[Session]:
    engine = patient_engine(settings.database_url)
    with Session(engine, expire_on_commit=False) as session:
        yield session
    engine.dispose()
