"""``secateur doctor`` with everything there, and with each thing broken."""

from pathlib import Path

import pytest
from cryptography.fernet import Fernet
from pydantic import SecretStr
from sqlalchemy.orm import Session

from app.auth import service as auth
from app.config import Settings, get_settings
from app.fleet import repository as fleet
from app.storage.service import join
from app.storage.store import open_store
from tests import hub as fake
from tests.api.conftest import ServerThread
from tests.forked import secateur as run
from workers import doctor
from workers.doctor import Finding, examine

SIGNING = "whsec_" + "A" * 32


def found(settings: Settings) -> dict[str, Finding]:
    return {finding.part: finding for finding in examine(settings)}


@pytest.fixture
def complete(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> Settings:
    monkeypatch.setenv("SECATEUR_SECRET_KEYS", Fernet.generate_key().decode())
    monkeypatch.setenv("SECATEUR_WEBHOOK_SECRET", SIGNING)
    monkeypatch.setenv("SECATEUR_HEARTBEAT_INTERVAL", "600")  # a worker that has beaten once is alive
    monkeypatch.setenv("SECATEUR_LEASE_TTL", "6000")
    monkeypatch.setattr(doctor, "LITTLE_ROOM", 0)
    get_settings.cache_clear()
    return get_settings()


def test_all_is_well(complete: Settings, session: Session) -> None:
    fleet.beat(session, "w", "worker", {"device": "cpu"})
    fleet.beat(session, "s", "scheduler", {})
    assert found(complete)["storage"].verdict == "warning", "no worker has joined it yet"
    join(session, open_store(complete))
    with ServerThread() as url:
        complete.data_dir.mkdir(parents=True, exist_ok=True)
        (complete.data_dir / "api-url").write_text(url)
        verdicts = {part: finding.verdict for part, finding in found(complete).items()}
    assert {verdicts.pop("device"), verdicts.pop("llama.cpp")} <= {"ok", "warning"}
    assert set(verdicts.values()) == {"ok"} and len(verdicts) == 11
    told = run("doctor")
    assert told.returncode == 0 and told.stdout.count("ok  ") >= 6
    assert SIGNING not in told.stdout


@pytest.mark.parametrize(
    ("changes", "part", "verdict", "advice"),
    [
        ({"database_url": "postgresql+psycopg://x:hunter2@127.0.0.1:9/x"}, "database", "failed", "DATABASE_URL"),
        ({"broker_url": "redis://:hunter2@127.0.0.1:9/0"}, "broker", "failed", "BROKER_URL"),
        ({"data_dir": Path("/proc/nothing")}, "disk", "failed", "DATA_DIR"),
        ({"data_dir": Path("/proc/nothing")}, "storage", "failed", "STORAGE_URL"),
        ({"secret_keys": None}, "secrets", "warning", "operating.md"),
        ({"webhook_secret": None}, "secrets", "warning", "operating.md"),
        ({"hub_dir": None, "hf_token": None}, "Hub", "warning", "HF_TOKEN"),
    ],
)
def test_what_is_amiss(changes: dict[str, object], part: str, verdict: str, advice: str, complete: Settings) -> None:
    findings = found(complete.model_copy(update=changes))
    assert findings[part].verdict == verdict and advice in findings[part].advice
    assert not any("hunter2" in str(finding) for finding in findings.values())


def test_little_room_and_no_worker(complete: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "LITTLE_ROOM", 2**62)
    findings = found(complete)
    assert [findings[part].verdict for part in ("disk", "workers", "scheduler", "API")] == ["warning"] * 4


def test_an_api_that_is_not_ready_says_what_it_lacks(complete: Settings) -> None:
    with ServerThread() as url:
        complete.data_dir.mkdir(parents=True)
        (complete.data_dir / "api-url").write_text(url)
        finding = found(complete)["API"]
    assert finding.verdict == "warning" and "no live worker" in finding.found and "no live scheduler" in finding.found


def test_tokens_whose_key_is_gone(complete: Settings, session: Session) -> None:
    key, _ = auth.create(session, "alice")
    auth.keep_hub_token(session, complete, key.id, SecretStr("hf_old"))
    assert found(complete)["tokens"].found == "1 Hub tokens are stored, and all can be decrypted"
    for keys in (None, SecretStr(Fernet.generate_key().decode())):
        finding = found(complete.model_copy(update={"secret_keys": keys}))["tokens"]
        assert finding.verdict == "failed" and finding.found.startswith("1 of 1") and "SECRET_KEYS" in finding.advice
    assert complete.secret_keys is not None
    newer = f"{Fernet.generate_key().decode()},{complete.secret_keys.get_secret_value()}"
    assert found(complete.model_copy(update={"secret_keys": SecretStr(newer)}))["tokens"].verdict == "ok"


def test_a_data_folder_of_a_newer_version(complete: Settings) -> None:
    complete.data_dir.mkdir(parents=True)
    (complete.data_dir / "layout-version").write_text("99\n")
    finding = found(complete)["disk"]
    assert finding.verdict == "failed" and "newer version" in finding.found


def test_a_storage_that_is_not_the_services(complete: Settings, session: Session, tmp_path: Path) -> None:
    join(session, open_store(complete))
    finding = found(complete.model_copy(update={"storage_url": (tmp_path / "another").as_uri()}))["storage"]
    assert finding.verdict == "failed" and "do not use the same storage" in finding.found


@pytest.mark.parametrize("there", [True, False])
def test_llama_cpp(there: bool, complete: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("secateur.extras.find_spec", lambda name: object() if there or name != "llama_cpp" else None)
    finding = found(complete)["llama.cpp"]
    assert (finding.verdict, "secateur[gguf]" in finding.advice) == (("ok", False) if there else ("warning", True))


def test_an_old_schema(settings: Settings, empty_database_url: str) -> None:
    finding = found(settings.model_copy(update={"database_url": empty_database_url}))["database"]
    assert finding.verdict == "failed" and "secateur migrate" in finding.advice


@pytest.mark.parametrize(("token", "verdict"), [(fake.TOKEN, "ok"), ("hf_wrong", "failed")])
def test_the_hub(token: str, verdict: str, settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    with fake.running() as hub:
        monkeypatch.delenv("SECATEUR_HUB_DIR")
        monkeypatch.setenv("SECATEUR_HF_TOKEN", token)
        monkeypatch.setenv("SECATEUR_HF_ENDPOINT", hub.url)
        get_settings.cache_clear()
        finding = found(get_settings())["Hub"]
        assert finding.verdict == verdict and token not in str(finding)


def test_the_exit_code(settings: Settings) -> None:
    told = run("doctor", "--json", environment={"SECATEUR_BROKER_URL": "redis://127.0.0.1:9/0"})
    assert told.returncode == 1 and '"verdict": "failed"' in told.stdout


def test_without_the_engine(complete: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("secateur.extras.find_spec", lambda name: None if name == "torch" else object())
    finding = found(complete)["versions"]
    assert finding.verdict == "warning" and finding.found.endswith("not installed: torch")
    assert "secateur[engine]" in finding.advice
