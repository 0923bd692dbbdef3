"""The estimate of what a job takes, against what the speed benchmark measured; and what follows from it at the door."""

import json
from pathlib import Path
from typing import Any

import httpx2
import pytest
from sqlalchemy.orm import Session

from app.fleet import repository as fleet
from secateur.catalog.architectures import shape_from_config
from secateur.catalog.memory import Place, check_fits, estimate
from secateur.catalog.resolve import Resolved, resolve
from secateur.catalog.spec import Calibration, PruningSpec
from secateur.contract.errors import PruningError
from workers.devices import device_memory

SPEED = Path(__file__).parents[2] / "docs" / "benchmarks" / "speed.json"
SMOLLM2 = {
    "model_type": "llama",
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 9,
    "vocab_size": 49152,
    "tie_word_embeddings": True,
}
"""As the benchmark has it: its KV heads repeated."""
LLAMA_7B = {
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "vocab_size": 32000,
}
GIB = 2**30


def asked(config: dict[str, Any], dtype: str, **changes: Any) -> Resolved:
    spec = PruningSpec.model_validate({"target_ratio": 0.5, "method": "secateur", **changes})
    return resolve(spec, shape_from_config(config), config=config, source_dtype=dtype)


@pytest.mark.parametrize("measured", json.loads(SPEED.read_text())["results"], ids=lambda each: each["case"]["method"])
def test_it_is_near_what_was_measured_and_rather_below(measured: dict[str, Any]) -> None:
    case, result = measured["case"], measured["result"]
    calibration = Calibration(samples=case["samples"], sequence_length=case["sequence_length"])
    changes = {"method": case["method"], "rounds": case["rounds"], "target_ratio": case["ratio"]}
    resolved = asked(SMOLLM2, "float32", **changes, calibration=calibration)
    memory = estimate(resolved, shape_from_config(SMOLLM2), Place.RESIDENT)
    assert memory.weights == pytest.approx(result["model_bytes"], rel=0.02)
    assert 0.7 < (memory.weights + memory.stages["layer by layer"]) / result["peak_bytes"] < 1.05


def test_what_takes_more() -> None:
    shape = shape_from_config(LLAMA_7B)

    def total(dtype: str = "float16", **changes: Any) -> int:
        return estimate(asked(LLAMA_7B, dtype, **changes), shape, Place.RESIDENT).total

    assert 12.5 * GIB < total() < 16 * GIB
    assert total("float32") > 1.8 * total()
    assert total(rounds=3) > 1.8 * total(), "the unpruned model beside it"
    assert total(method="llm-pruner") > total(method="piem", rounds=1) > total(method="random")
    assert (
        total(recovery={"training": {"kind": "distill"}}) > 100 * GIB > total(recovery={"training": {"kind": "lora"}})
    )
    long = {"samples": 512, "sequence_length": 2048}
    assert total(calibration=long) > total() + 3 * 2**20 * 4096 * 2 * 0.9
    mapped = estimate(asked(LLAMA_7B, "float16"), shape, Place.MAPPED)
    assert mapped.weights < 0.04 * estimate(asked(LLAMA_7B, "float16"), shape, Place.RESIDENT).weights, "one layer"
    trained = asked(LLAMA_7B, "float16", recovery={"training": {"kind": "lora"}})
    assert (
        0.5 < estimate(trained, shape, Place.MAPPED).weights / estimate(trained, shape, Place.RESIDENT).weights < 0.55
    )


def test_advice() -> None:
    resolved = asked(LLAMA_7B, "float32", method="llm-pruner")
    memory = estimate(resolved, shape_from_config(LLAMA_7B), Place.RESIDENT)
    with pytest.raises(PruningError, match="at least") as caught:
        check_fits(resolved, memory, 24 * GIB)
    error = caught.value
    assert (error.code, error.field, error.retryable) == ("out_of_memory", "model_id", False)
    for advised in ("bfloat16", "'wanda'", "larger worker", "24.0"):
        assert advised in error.message
    check_fits(resolved, memory, memory.total)


def test_admission(api: httpx2.Client, body: dict[str, Any], session: Session) -> None:
    plan = api.post("/v1/jobs?validate_only=true", json=body).json()
    assert plan["memory_bytes"] > 4 * plan["shape"]["parameters"]
    assert api.post("/v1/jobs", json=body).status_code == 202, "no worker is known"
    for memory, status in ((1000, 422), (10 * GIB, 202)):
        fleet.beat(session, f"w{memory}", "worker", {"device": "cuda", "memory_bytes": memory})
        answer = api.post("/v1/jobs", json=body)
        assert answer.status_code == status, answer.text
        if status == 422:
            assert answer.json()["code"] == "out_of_memory" and answer.json()["errors"][0]["field"] == "model_id"


def test_what_this_machine_has() -> None:
    known = device_memory()
    assert known["device"] in ("cpu", "cuda") and known["memory_bytes"] > 2**28


def test_a_worker_offers_the_memory_that_a_job_may_use(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert device_memory(2**20) == {"device": "cpu", "memory_bytes": 2**20}
    assert device_memory(2**80) == device_memory(None) == device_memory()


def test_a_gpu_is_asked_for_its_memory(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    program = tmp_path / "nvidia-smi"
    program.write_text('#!/bin/sh\ncase "$*" in -L) echo "GPU 0: H";; *--id=0*) echo 81920;; esac\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert device_memory() == {"device": "cuda", "memory_bytes": 80 * GIB}
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert device_memory()["device"] == "cpu"
