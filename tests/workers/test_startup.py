"""A process that cannot start says why in one sentence: the schema, the data folder or the settings are not for this version."""

import subprocess
from pathlib import Path

import pytest
from sqlalchemy import create_engine, text

from app import data_folder
from app.config import Settings
from app.data_folder import DataFolderError
from app.db.migrate import SchemaError, check_schema, newest_revision, upgrade
from tests.patience import PATIENCE
from tests.workers.conftest import Start, wait_for
from workers.embedded import free_port
from workers.health import Unhealthy, check
from workers.roles import Role

API = ("uvicorn", "app.main:create_app", "--factory", "--port", "0")
PROCESSES = {
    "api": API,
    "scheduler": ("workers", "scheduler"),
    "worker": ("workers", "worker"),
    "migrate": ("workers", "migrate"),
}


def refusal(start: Start, process: str) -> str:
    """Return what the process says when it ends at once with the exit code of a refusal."""
    ended = start(*PROCESSES[process], stderr=subprocess.PIPE)
    _, complaint = ended.communicate(timeout=PATIENCE)
    assert ended.returncode == 2 and b"Traceback" not in complaint, complaint.decode()
    return complaint.decode()


def set_revision(settings: Settings, revision: str) -> None:
    engine = create_engine(settings.database_url)
    with engine.begin() as connection:
        connection.execute(text("UPDATE alembic_version SET version_num = :revision"), {"revision": revision})
    engine.dispose()


@pytest.mark.parametrize("process", PROCESSES)
def test_a_newer_schema(process: str, settings: Settings, start: Start) -> None:
    set_revision(settings, "9999_future")
    told = refusal(start, process)
    assert "newer version" in told and "9999_future" in told and str(newest_revision()) in told


@pytest.mark.parametrize("process", ["api", "scheduler", "worker"])
def test_an_older_schema(process: str, settings: Settings, start: Start) -> None:
    set_revision(settings, "0001")
    assert "run 'secateur migrate'" in refusal(start, process)


@pytest.mark.parametrize("process", PROCESSES)
def test_a_data_folder_of_a_newer_version(process: str, settings: Settings, start: Start) -> None:
    settings.data_dir.mkdir(parents=True)
    (settings.data_dir / data_folder.FILE).write_text("99\n")
    told = refusal(start, process)
    assert "layout 99" in told and "SECATEUR_DATA_DIR" in told


@pytest.mark.parametrize("process", PROCESSES)
def test_settings_that_contradict(
    process: str, settings: Settings, start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SECATEUR_LEASE_TTL", "10")
    told = refusal(start, process)
    assert told.count("\n") == 1 and "SECATEUR_LEASE_TTL (10)" in told and "SECATEUR_LEASE_MARGIN (60)" in told


def test_an_api_starts_while_its_database_is_away(
    settings: Settings, start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SECATEUR_DATABASE_URL", "postgresql+psycopg://x@127.0.0.1:9/x")
    port = free_port()
    start("uvicorn", "app.main:create_app", "--factory", "--port", port)

    def answers() -> bool:
        try:
            return bool(check(Role.API, settings, f"http://127.0.0.1:{port}"))
        except Unhealthy:
            return False

    wait_for(answers)


def test_a_port_that_is_taken(settings: Settings, start: Start, valkey: object, broker_url: str) -> None:
    port = broker_url.rpartition(":")[2].partition("/")[0]
    api = start(*API[:-1], port, stderr=subprocess.PIPE)
    _, complaint = api.communicate(timeout=PATIENCE)
    assert api.returncode > 0 and b"address already in use" in complaint and b"Traceback" not in complaint


def test_the_schema_of_this_version_passes(settings: Settings, empty_database_url: str) -> None:
    check_schema(settings.database_url)
    with pytest.raises(SchemaError, match="secateur migrate"):
        check_schema(empty_database_url)
    upgrade(empty_database_url)
    check_schema(empty_database_url)


def test_the_layout_of_a_data_folder(tmp_path: Path) -> None:
    folder = tmp_path / "new" / "data"
    data_folder.check(folder)
    assert not folder.exists(), "whoever only reads writes nothing"
    data_folder.claim(folder)
    assert (folder / data_folder.FILE).read_text() == f"{data_folder.VERSION}\n"
    data_folder.claim(folder)
    for content, reason in (("99", "newer"), ("0", "unknown"), ("x", "does not hold a number"), ("", "number")):
        (folder / data_folder.FILE).write_text(content)
        for attempt in (data_folder.check, data_folder.claim):
            with pytest.raises(DataFolderError, match=reason):
                attempt(folder)
    (tmp_path / "file").touch()
    with pytest.raises(DataFolderError, match="cannot be written"):
        data_folder.claim(tmp_path / "file" / "data")
