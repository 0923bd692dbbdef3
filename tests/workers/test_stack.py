"""``secateur up``: one command, all processes; nothing outlives it and nothing is lost."""

import json
import re
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import httpx2
import psutil
import pytest
from pydantic import SecretStr

from app.config import Settings
from tests.patience import PATIENCE
from tests.workers.conftest import ROOT, Start, alive, wait_for
from workers.__main__ import Place, _hub_folder
from workers.embedded import EmbeddedError, free_port, start_postgres
from workers.stack import StackError, _choose_port


@pytest.fixture
def environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """No settings but a data folder."""
    for name in ("SECATEUR_DATABASE_URL", "SECATEUR_BROKER_URL", "SECATEUR_HUB_DIR", "SECATEUR_HF_TOKEN", "HF_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("SECATEUR_DATA_DIR", str(tmp_path / "data"))
    return tmp_path / "data"


def announced(process: subprocess.Popen[bytes]) -> tuple[str, str]:
    """Return the address that the process prints when it is ready, and all that it prints until then."""
    assert process.stdout is not None
    text = b""
    while b"Ctrl-C" not in text:
        line = process.stdout.readline()
        assert line, f"it ended: {text.decode()}"
        text += line
    url = re.search(r"running at (\S+)", text.decode())
    assert url
    return url[1], text.decode()


def address_and_key(process: subprocess.Popen[bytes], data: Path) -> tuple[str, str]:
    """Return the address of ``secateur up`` on the folder ``data``, when it is ready, and the API key that is kept there."""
    url, _ = announced(process)
    return url, (data / "api-key").read_text().strip()


def test_up_survives_kill_9_and_ends_on_ctrl_c(start: Start, environment: Path) -> None:
    up = start("workers", "up", stdout=subprocess.PIPE)
    url, text = announced(up)
    key = (environment / "api-key").read_text().strip()
    assert f"API key        {key}" in text and f"{url}/#key={key}" in text
    methods = httpx2.get(f"{url}/v1/methods", headers={"Authorization": f"Bearer {key}"})
    assert methods.status_code == 200
    assert httpx2.get(f"{url}/docs").status_code == 200
    assert (environment / "api-key").stat().st_mode & 0o777 == 0o600

    assert (environment / "database-url").stat().st_mode & 0o777 == 0o600
    _keys_can_be_managed(url)
    _the_doctor_finds_it(url, environment)

    second = start("workers", "up", stderr=subprocess.PIPE)
    _, complaint = second.communicate(timeout=PATIENCE)
    assert second.returncode == 1 and f"process {up.pid}".encode() in complaint

    family = psutil.Process(up.pid).children(recursive=True)
    assert len(family) >= 8, "postgres and its backends, valkey, api, scheduler, worker and its child"
    for server in ("uvicorn", "bin/postgres"):
        killed = _child(up, server)
        assert killed is not None
        killed.kill()
        wait_for(lambda: _child(up, server) not in (None, killed))  # noqa: B023
        wait_for(lambda: _answers(url))

    family = psutil.Process(up.pid).children(recursive=True)
    up.kill()
    up.wait()
    wait_for(lambda: not any(alive(child.pid) for child in family))

    up = start("workers", "up", stdout=subprocess.PIPE)
    url, text = announced(up)
    assert (environment / "api-key").read_text().strip() == key
    assert key not in text, "a key is shown once"
    assert f"API key        in {environment / 'api-key'}" in text and "secateur keys create" in text
    assert httpx2.get(f"{url}/v1/jobs", headers={"Authorization": f"Bearer {key}"}).status_code == 200
    family = psutil.Process(up.pid).children(recursive=True)
    up.send_signal(signal.SIGINT)
    assert up.wait(PATIENCE) == 0
    assert not any(alive(child.pid) for child in family)


def _keys_can_be_managed(url: str) -> None:
    """From another shell, which is told of the data folder alone."""

    def keys(*arguments: str) -> str:
        argv = [sys.executable, "-m", "workers", "keys", *arguments]
        return subprocess.run(argv, cwd=ROOT, capture_output=True, text=True, check=True, timeout=PATIENCE).stdout

    key = json.loads(keys("create", "carol", "--json"))
    headers = {"Authorization": f"Bearer {key['secret']}"}
    assert httpx2.get(f"{url}/v1/jobs", headers=headers).status_code == 200
    assert [row["name"] for row in json.loads(keys("list", "--json"))] == ["secateur up", "carol"]
    keys("revoke", key["id"])
    assert httpx2.get(f"{url}/v1/jobs", headers=headers).status_code == 401


def _the_doctor_finds_it(url: str, folder: Path) -> None:
    """The doctor is called from another shell, which names the data folder alone."""
    argv = [sys.executable, "-m", "workers", "doctor", "--json"]
    told = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE)
    found = {finding["part"]: finding for finding in json.loads(told.stdout)}
    assert told.returncode == 0, told.stdout
    for part in ("database", "broker", "API", "storage", "workers", "scheduler", "Hub", "tokens"):
        assert found[part]["verdict"] in ("ok", "warning"), found[part]
    assert found["broker"]["verdict"] == found["scheduler"]["verdict"] == found["API"]["verdict"] == "ok"
    assert url in found["API"]["found"] and str(folder / "hub") in found["Hub"]["found"]
    assert "SECRET_KEYS" not in found["secrets"]["found"], "which the data folder holds"
    for name in ("broker-url", "secret-key", "database-url"):
        assert (folder / name).stat().st_mode & 0o777 == 0o600
        assert (folder / name).read_text().strip() not in told.stdout


def _child(up: subprocess.Popen[bytes], program: str) -> psutil.Process | None:
    """The child that has ``program`` in its command line; ``None`` between the death of one and the start of the next."""
    for child in psutil.Process(up.pid).children():
        with suppress(psutil.NoSuchProcess):
            if alive(child.pid) and program in " ".join(child.cmdline()):
                return child
    return None


def _answers(url: str) -> bool:
    try:
        return httpx2.get(f"{url}/readyz", timeout=30).status_code == 200
    except httpx2.TransportError:
        return False


def test_a_port_that_is_taken_is_said(start: Start, environment: Path, postgres: object, database_url: str) -> None:
    port = re.search(r":(\d+)/", database_url)
    assert port
    up = start("workers", "up", "--port", port[1], stderr=subprocess.PIPE)
    _, complaint = up.communicate(timeout=PATIENCE)
    assert up.returncode == 1 and b"Address already in use" in complaint


@pytest.mark.parametrize(
    ("variables", "arguments", "told"),
    [
        ({"HF_TOKEN": "hf_x"}, [], ("--publish hub", "--publish folder", "SECATEUR_HUB_DIR")),
        ({"SECATEUR_HUB_DIR": "/nowhere"}, ["--publish", "hub"], ("--publish hub", "SECATEUR_HUB_DIR")),
        ({}, ["--publish", "moon"], ("--publish",)),
        ({"SECATEUR_LEASE_TTL": "10"}, [], ("SECATEUR_LEASE_TTL", "SECATEUR_LEASE_MARGIN")),
    ],
)
def test_up_refuses_what_it_cannot_know(
    variables: dict[str, str],
    arguments: list[str],
    told: tuple[str, ...],
    start: Start,
    environment: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    up = start("workers", "up", *arguments, stderr=subprocess.PIPE)
    _, complaint = up.communicate(timeout=PATIENCE)
    assert up.returncode == 2 and b"Traceback" not in complaint
    assert all(part in complaint.decode() for part in told), complaint.decode()
    assert not environment.exists(), "nothing was started"


@pytest.mark.parametrize(
    ("place", "hub_dir", "token", "folder"),
    [
        (None, None, None, "data/hub"),
        (None, "elsewhere", None, "elsewhere"),
        (None, "elsewhere", "hf_x", "elsewhere"),
        (Place.FOLDER, None, "hf_x", "data/hub"),
        (Place.FOLDER, "elsewhere", "hf_x", "elsewhere"),
        (Place.HUB, None, "hf_x", None),
        (Place.HUB, None, None, None),
    ],
)
def test_where_up_publishes(place: Place | None, hub_dir: str | None, token: str | None, folder: str | None) -> None:
    settings = Settings(data_dir=Path("data")).model_copy(
        update={"hub_dir": hub_dir and Path(hub_dir), "hf_token": token and SecretStr(token)}
    )
    assert _hub_folder(settings, place) == (folder and Path(folder))


def test_postgres_of_another_version_is_said(tmp_path: Path) -> None:
    data = tmp_path / "postgres" / "data"
    data.mkdir(parents=True)
    (data / "PG_VERSION").write_text("9\n")
    with pytest.raises(EmbeddedError, match=r"made by Postgres 9, and this installation has Postgres \d+.*pg_dump"):
        start_postgres(tmp_path / "postgres", free_port())


def test_a_host_that_is_not_here_is_said(environment: Path) -> None:
    with pytest.raises(StackError, match=r"cannot listen on 192\.0\.2\.1 port 8000"):
        _choose_port("192.0.2.1", None)
