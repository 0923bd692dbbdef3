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

from tests.patience import PATIENCE
from tests.workers.conftest import ROOT, Start, alive, wait_for


@pytest.fixture
def environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """No settings but a data folder."""
    for name in ("DATABASE_URL", "BROKER_URL", "HUB_DIR"):
        monkeypatch.delenv(f"SECATEUR_{name}", raising=False)
    monkeypatch.setenv("SECATEUR_DATA_DIR", str(tmp_path / "data"))
    return tmp_path / "data"


def announced(process: subprocess.Popen[bytes]) -> tuple[str, str]:
    """The address and the key that it prints when it is ready."""
    assert process.stdout is not None
    text = b""
    while b"Ctrl-C" not in text:
        line = process.stdout.readline()
        assert line, f"it ended: {text.decode()}"
        text += line
    url = re.search(r"running at (\S+)", text.decode())
    key = re.search(r"API key +(\S+)", text.decode())
    assert url and key
    return url[1], key[1]


def test_up_survives_kill_9_and_ends_on_ctrl_c(start: Start, environment: Path) -> None:
    up = start("workers", "up", stdout=subprocess.PIPE)
    url, key = announced(up)
    methods = httpx2.get(f"{url}/v1/methods", headers={"Authorization": f"Bearer {key}"})
    assert methods.status_code == 200
    assert httpx2.get(f"{url}/docs").status_code == 200
    assert (environment / "api-key").stat().st_mode & 0o777 == 0o600

    assert (environment / "database-url").stat().st_mode & 0o777 == 0o600
    _keys_can_be_managed(url)

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
    url, same_key = announced(up)
    assert same_key == key
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
