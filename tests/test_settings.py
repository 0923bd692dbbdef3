"""Settings that contradict each other are refused, and each setting is described."""

import re
from pathlib import Path

import pytest
from pydantic import ValidationError

from app.config import API_URL_FILE, STACK_FILES, Settings
from secateur.settings import LibrarySettings

ROOT = Path(__file__).parents[1]
SIGNING = "whsec_" + "A" * 32


@pytest.fixture(autouse=True)
def _no_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in Settings.model_fields:
        monkeypatch.delenv(f"SECATEUR_{name.upper()}", raising=False)


@pytest.mark.parametrize(
    ("given", "names"),
    [
        ({"lease_ttl": 10}, ("LEASE_TTL", "LEASE_MARGIN")),
        ({"lease_margin": 60}, ("LEASE_TTL", "LEASE_MARGIN")),
        ({"heartbeat_interval": 45}, ("HEARTBEAT_INTERVAL", "LEASE_TTL", "LEASE_MARGIN")),
        ({"lease_ttl": 25, "lease_margin": 15}, ("HEARTBEAT_INTERVAL", "LEASE_TTL", "LEASE_MARGIN")),
        ({"scheduler_interval": 61}, ("SCHEDULER_INTERVAL", "LEASE_TTL")),
        ({"max_running_jobs": 1001}, ("MAX_RUNNING_JOBS", "MAX_OPEN_JOBS")),
        ({"webhook_networks": "10.0.0.0/8"}, ("WEBHOOK_NETWORKS", "WEBHOOK_SECRET")),
        ({"data_dir": "d", "hub_dir": Path("d", "work", "hub")}, ("HUB_DIR", "DATA_DIR")),
        ({"data_dir": "d", "hub_dir": "d/x/../work"}, ("HUB_DIR", "DATA_DIR")),
    ],
)
def test_contradictions_are_refused(given: dict[str, object], names: tuple[str, ...]) -> None:
    with pytest.raises(ValidationError) as caught:
        Settings(**given)  # type: ignore[arg-type]
    [error] = caught.value.errors()
    assert all(f"SECATEUR_{name}" in error["msg"] for name in names), error["msg"]


@pytest.mark.parametrize(
    "given",
    [
        {},
        {"lease_ttl": 6, "lease_margin": 2, "heartbeat_interval": 0.5},
        {"max_running_jobs": 1000},
        {"max_running_jobs": 5000, "max_open_jobs": None},
        {"webhook_networks": "10.0.0.0/8", "webhook_secret": SIGNING},
        {"data_dir": "d", "hub_dir": "d/hub"},
        {"data_dir": "d", "hub_dir": "work"},
    ],
)
def test_what_agrees_is_accepted(given: dict[str, object]) -> None:
    Settings(**given)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "given",
    [
        *[{name: value} for name, field in Settings.model_fields.items() if field.annotation is float for value in (-1, "nan", "inf")],
        {"max_failures": 0},
        {"torch_threads": 0},
        {"retention": 0},
        {"lease_ttl": 1e300},
        {"broker_url": "amqp://x"},
        {"broker_url": "redis://"},
        {"otlp_endpoint": "collector:4318"},
        {"otlp_endpoint": "http://collector:port"},
        {"mlflow_tracking_uri": "sqlite:///mlflow.db"},
        {"mlflow_tracking_uri": "http:///path"},
        {"mlflow_tracking_uri": "https://mlflow/?a=b"},
    ],
)  # fmt: skip
def test_values_that_make_no_sense_are_refused(given: dict[str, object]) -> None:
    with pytest.raises(ValidationError) as caught:
        Settings(**given)  # type: ignore[arg-type]
    assert caught.value.errors()[0]["loc"] == tuple(given)


def test_the_service_of_the_data_folder_is_found(tmp_path: Path) -> None:
    settings = Settings(data_dir=tmp_path)
    assert settings.nearest() is settings
    written = {
        "database_url": "postgresql+psycopg://u:p@localhost:1/x",
        "broker_url": "redis://:p@localhost:2/0",
        "secret_keys": "A" * 43 + "=",
        "hub_dir": str(tmp_path / "hub"),
    }
    assert written.keys() == STACK_FILES.keys()
    for name, value in written.items():
        (tmp_path / STACK_FILES[name]).write_text(f"{value}\n")
    (tmp_path / API_URL_FILE).write_text("http://127.0.0.1:8123\n")
    found = Settings(data_dir=tmp_path, broker_url="redis://chosen").nearest()
    assert found.database_url == written["database_url"] and found.hub_dir == tmp_path / "hub"
    assert found.secret_keys is not None and found.secret_keys.get_secret_value() == written["secret_keys"]
    assert found.broker_url == "redis://chosen", "what the environment names is kept"
    assert settings.nearest_api_url() == "http://127.0.0.1:8123"


def test_every_setting_is_in_the_manual() -> None:
    page = (ROOT / "docs" / "operating.md").read_text()
    rows = set(re.findall(r"`((?:SECATEUR|HF)_[A-Z_]+)`", "".join(re.findall(r"^\| `.*?\|", page, re.MULTILINE))))
    variables = {f"SECATEUR_{name.upper()}" for name in Settings.model_fields} - {
        "SECATEUR_HF_TOKEN",
        "SECATEUR_HF_ENDPOINT",
    }
    assert rows - {"SECATEUR_HOME", "SECATEUR_SECRETS_DIR"} == variables | {"HF_TOKEN", "HF_ENDPOINT"}


def test_every_default_is_in_the_manual() -> None:
    page = (ROOT / "docs" / "operating.md").read_text()
    for name, field in Settings.model_fields.items():
        if name in LibrarySettings.model_fields or not isinstance(field.default, int | float | bool | str):
            continue
        row = re.search(rf"^\| `SECATEUR_{name.upper()}` \| (.*?) \|", page, re.MULTILINE)
        assert row, name
        if name not in ("database_url", "broker_url"):
            assert row[1].strip("`").removesuffix(" s") == f"{field.default!s:}".lower().removesuffix(".0"), row[0]
