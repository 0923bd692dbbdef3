"""Hostile files of local models: the API answers with a problem document, never with 500."""

import json
import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx2
import pytest

from app.config import Settings
from tests.api.conftest import CONFIG

FILES: list[tuple[str, bytes | dict[str, Any] | str]] = [
    ("config.json", b"[" * 100_000),
    ("config.json", b'{"a":' * 300 + b"1" + b"}" * 300),
    ("config.json", "folder"),
    ("config.json", "pipe"),
    ("config.json", CONFIG | {"num_hidden_layers": 300_000, "model_type": "granite"}),
    ("config.json", CONFIG | {"rope_scaling": 5}),
    ("config.json", CONFIG | {"rope_parameters": {"rope_type": [[]]}}),
    ("config.json", CONFIG | {"rope_parameters": {"partial_rotary_factor": "x"}}),
    ("config.json", CONFIG | {"architectures": 5, "model_type": "granite"}),
    ("config.json", CONFIG | {"hidden_size": 10**4000}),
    ("config.json", {"model_type": "chatglm", "num_layers": 28, "layernorm_epsilon": 10**400}),
    ("config.json", CONFIG | {"num_attention_heads": 2**20, "num_key_value_heads": 2**20, "intermediate_size": 2**24}),
    ("model.safetensors.index.json", b"[" * 100_000),
    ("model.safetensors.index.json", b"[[[]]]"),
    ("model.safetensors.index.json", {"weight_map": [[]]}),
    ("model.safetensors.index.json", "folder"),
    ("model.safetensors.index.json", "pipe"),
    ("model.safetensors", struct.pack("<Q", 2**60)),
    ("model.safetensors", "folder"),
    ("tokenizer.json", "folder"),
    ("tokenizer.json", "pipe"),
    ("generation_config.json", "folder"),
    ("generation_config.json", b"[" * 100_000),
]


@pytest.mark.parametrize("path", ["/v1/models/inspect", "/v1/jobs?validate_only=true"])
def test_hostile_files_get_a_problem(
    path: str, api: httpx2.Client, make_model: Callable[..., str], settings: Settings
) -> None:
    for number, (name, content) in enumerate(FILES):
        model_id = make_model(f"hostile-{number}")
        file: Path = settings.models_dir / f"hostile-{number}" / name
        file.unlink(missing_ok=True)
        if content == "folder":
            file.mkdir()
        elif content == "pipe":
            os.mkfifo(file)
        else:
            file.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
        body = {"model_id": model_id} | ({} if "inspect" in path else {"target_ratio": 0.2, "method": "magnitude"})
        response = api.post(path, json=body)
        assert response.status_code == 422 and response.json()["code"] != "internal_error", (name, content)


def test_a_hostile_gguf_file_gets_a_problem(api: httpx2.Client, settings: Settings) -> None:
    folder = settings.models_dir / "gguf"
    folder.mkdir(parents=True)
    endless = b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + struct.pack("<Q", 1) + b"a" + struct.pack("<IIQ", 9, 0, 2**50)
    (folder / "m.gguf").write_bytes(endless + bytes(5_000_000))
    response = api.post("/v1/models/inspect", json={"model_id": "local:gguf"})
    assert (response.status_code, response.json()["code"]) == (422, "weights_corrupt")


def test_planning_of_the_largest_sizes_ends(api: httpx2.Client, make_model: Callable[..., str]) -> None:
    sizes = {"hidden_size": 1024, "num_attention_heads": 1024, "num_key_value_heads": 1024, "head_dim": 1}
    model_id = make_model("large", CONFIG | sizes | {"intermediate_size": 2**20, "num_hidden_layers": 1024})
    response = api.post("/v1/models/inspect", json={"model_id": model_id})
    assert response.status_code == 200 and len(response.json()["shape"]["layers"]) == 1024
