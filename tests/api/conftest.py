"""The API on a real socket, and a model folder it can look at."""

import json
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import httpx2
import numpy as np
import pytest
import uvicorn
from huggingface_hub import constants
from safetensors.numpy import save_file
from sqlalchemy.orm import Session

from app import health
from app import hub as hub_answers
from app.auth import service as auth
from app.config import Settings, get_settings
from app.http import rate
from app.main import create_app
from app.webhooks import service as webhooks
from secateur.catalog import hub_reads
from secateur.contract.keys import USER, KeySettings, Scope
from tests import hub as fake
from tests.patience import PATIENCE

CONFIG: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 64,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 8,
    "intermediate_size": 256,
    "num_hidden_layers": 4,
    "vocab_size": 100,
    "max_position_embeddings": 128,
    "tie_word_embeddings": True,
}


class ServerThread(uvicorn.Server):
    """uvicorn on a free port, in a thread."""

    def __init__(self) -> None:
        super().__init__(uvicorn.Config(create_app(), port=0, log_level="warning", timeout_graceful_shutdown=1))
        self.thread = threading.Thread(target=self.run, daemon=True)

    def __enter__(self) -> str:
        self.thread.start()
        while not self.started:
            assert self.thread.is_alive(), "the server did not start"
            time.sleep(0.01)
        port = self.servers[0].sockets[0].getsockname()[1]
        return f"http://127.0.0.1:{port}"

    def __exit__(self, *exception: object) -> None:
        self.should_exit = True
        self.thread.join(timeout=PATIENCE)


@pytest.fixture(autouse=True)
def _patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """The API runs in this process. On a busy machine it waits as long as a test does for a broker or a webhook's receiver."""
    monkeypatch.setattr(health, "BROKER_TIMEOUT", PATIENCE)
    monkeypatch.setattr(rate, "BROKER_SECONDS", PATIENCE)
    monkeypatch.setattr(webhooks, "TIMEOUT", PATIENCE)
    for name in ("CONNECT_SECONDS", "READ_SECONDS", "WHOLE_SECONDS"):
        monkeypatch.setattr(hub_reads, name, PATIENCE)
    hub_answers.forget()


@pytest.fixture
def url(settings: Settings) -> Iterator[str]:
    """The address of a running API."""
    with ServerThread() as url:
        yield url


@pytest.fixture
def make_client(url: str, session: Session) -> Iterator[Callable[..., httpx2.Client]]:
    """A client with an API key of its own, by the key's name, scopes and settings."""
    clients = []

    def make(name: str, scopes: Sequence[Scope] = USER, **key_settings: Any) -> httpx2.Client:
        _, secret = auth.create(session, name, scopes, KeySettings(**key_settings))
        clients.append(httpx2.Client(base_url=url, headers={"Authorization": f"Bearer {secret}"}, timeout=PATIENCE))
        return clients[-1]

    yield make
    for client in clients:
        client.close()


@pytest.fixture
def api(make_client: Callable[..., httpx2.Client]) -> httpx2.Client:
    """A client that may read, submit, and publish with the service's token in the namespace ``org``."""
    return make_client("alice", namespace="org", lend_hub_token=True)


@pytest.fixture
def whole(make_client: Callable[..., httpx2.Client]) -> httpx2.Client:
    """A client that may do everything."""
    return make_client("whole", [*Scope], namespace="org", lend_hub_token=True)


@pytest.fixture
def make_model(settings: Settings) -> Callable[..., str]:
    """A folder that looks like a model from outside: config, weights file, tokenizer; returns its model id."""

    def make(name: str = "tiny", config: dict[str, Any] = CONFIG) -> str:
        folder: Path = settings.models_dir / name
        folder.mkdir(parents=True)
        (folder / "config.json").write_text(json.dumps(config))
        (folder / "tokenizer.json").write_text("{}")
        save_file({"model.norm.weight": np.zeros(4, dtype=np.float32)}, folder / "model.safetensors")
        return f"local:{name}"

    return make


@pytest.fixture
def body(make_model: Callable[..., str]) -> dict[str, Any]:
    """A request that is accepted."""
    return {"model_id": make_model(), "target_ratio": 0.2, "method": "piem-lsps"}


@pytest.fixture
def hub(settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[fake.FakeHub]:
    """A Hub with one model; the service publishes there."""
    with fake.running() as hub:
        hub.create(
            "org/tiny",
            files={"config.json": json.dumps(CONFIG).encode(), "tokenizer.json": b"{}", "model.safetensors": b""},
        )
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.delenv("SECATEUR_HUB_DIR")
        monkeypatch.setenv("SECATEUR_HF_ENDPOINT", hub.url)
        monkeypatch.setenv("SECATEUR_HF_TOKEN", fake.TOKEN)
        get_settings.cache_clear()
        yield hub
