"""What the owner of a job sees holds no secrets and no paths of the service."""

from pathlib import Path

import pytest
from pydantic import SecretStr

from app.config import Settings
from app.sanitise import Sanitiser

DATA = "/srv/My Data/secateur"
TRACEBACK = f"""Traceback (most recent call last):
  File "/opt/venv/lib/python3.11/site-packages/torch/nn/modules/module.py", line 1511, in _call_impl
  File "{DATA}/jobs/1/modeling.py", line 3
OSError: Unable to load weights from file:///mnt/models/tiny/model.safetensors or ({Path.home()}/.cache/huggingface/hub/x)"""


@pytest.fixture
def sanitise(monkeypatch: pytest.MonkeyPatch) -> Sanitiser:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wJalr/XUtn+FEMI")
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "disabled")
    settings = Settings(
        data_dir=Path(DATA),
        database_url="postgresql+psycopg://secateur:hunter22@db/x",
        mlflow_tracking_uri="http://secateur:runner33@mlflow:5000",
        hf_token=SecretStr("servicetoken"),
        secret_keys=SecretStr("A" * 43 + "=," + "B" * 43 + "="),
    )
    return Sanitiser(settings, [SecretStr("jobtoken"), None])


def test_a_traceback_keeps_names_and_loses_places(sanitise: Sanitiser) -> None:
    told = sanitise(TRACEBACK)
    for place in ("/opt", "site-packages", "/srv", "My Data", "/mnt", str(Path.home())):
        assert place not in told
    for name in ("module.py", "line 1511", "…/jobs/1/modeling.py", "…/model.safetensors", "OSError"):
        assert name in told


@pytest.mark.parametrize(
    "secret",
    [
        "hunter22",
        "runner33",
        "servicetoken",
        "jobtoken",
        "wJalr/XUtn+FEMI",
        "B" * 43 + "=",
        "hf_AbCdEfGhIjKl",
        "sk-secateur-abc_DEF-123",
        "whsec_" + "A" * 32,
    ],
)
def test_secrets_are_hidden(secret: str, sanitise: Sanitiser) -> None:
    told = sanitise({"a": [f"x {secret} y", {"b": f"url?token={secret}"}], "n": 1, "none": None})
    assert secret not in str(told) and "***" in told["a"][0] and (told["n"], told["none"]) == (1, None)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("postgresql://me:pw@host/x", "postgresql://***@host/x"),
        ("Authorization: Bearer abc.def-ghi", "Authorization: Bearer ***"),
        ("PYTHONPATH=/a/b:/c/d/e", "PYTHONPATH=…/b:…/e"),
    ],
)
def test_what_hides_in_other_text(text: str, told: str, sanitise: Sanitiser) -> None:
    assert sanitise(text) == told


@pytest.mark.parametrize(
    "text",
    [
        "org/secateur",
        "https://huggingface.co/org/name/tree/main",
        "see GET /v1/methods or /v1/jobs/1/logs",
        "3/4 tokens/s, ratio 1/2",
        "tokenizers: parallelism disabled",
        "model.layers.0/x ~/notes",
    ],
)
def test_other_text_stays(text: str, sanitise: Sanitiser) -> None:
    assert sanitise(text) == text
