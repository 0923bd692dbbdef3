"""What needs a GPU: every method gives the plan that it gives on a CPU, layers are streamed to it, and memory is freed."""

import gc
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from secateur.catalog.memory import Place, estimate, streams
from secateur.catalog.methods import METHODS
from secateur.catalog.sources import locate
from secateur.contract.errors import ErrorCode, PruningError
from secateur.engine.model.loading import load
from tests.engine.running import prune, resolved
from tests.engine.test_placement import spec_of, write

DEVICE = "cuda"
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")]
ALIKE = 0.95
"""Smallest share of the kept units that two devices agree on; sums in another order decide between equal scores."""
STATIC = [name for name, method in METHODS.items() if not method.dynamic and name not in ("reap", "random")]


@pytest.fixture(scope="module")
def source(tokenizer: PreTrainedTokenizerFast, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("gpu") / "source", "llama", tokenizer)


@pytest.fixture(autouse=True)
def nothing_is_left() -> Iterator[None]:
    before = torch.cuda.memory_allocated()
    yield
    gc.collect()
    assert torch.cuda.memory_allocated() <= before + 2**20, "a run keeps no memory of the device"


def kept_units(folder: Path) -> set[tuple[int, str, int]]:
    layers = json.loads((folder / "secateur.json").read_text())["plan"]["layers"]
    return {
        (index, structure, unit)
        for index, layer in enumerate(layers)
        for structure, ranges in layer.items()
        for begin, end in ranges
        for unit in range(begin, end)
    }


def fields_of(method: str) -> dict[str, Any]:
    return {"target_ratio": 1 / 3} if method in ("shortgpt", "sleb") else {}


@pytest.mark.parametrize("method", STATIC)
def test_a_gpu_gives_the_plan_of_a_cpu(method: str, source: Path, tmp_path: Path) -> None:
    found = []
    for number, device in enumerate(("cpu", DEVICE)):
        out = tmp_path / str(number)
        report = prune(str(source), spec_of(method, **fields_of(method)), out, device=device).report
        found.append((kept_units(out), report["perplexity"]["after"]))
        assert report["device"].startswith(device)
    (one, loss), (other, same) = found
    assert len(one & other) >= ALIKE * len(one | other)
    assert same == pytest.approx(loss, rel=0.05)


@pytest.mark.parametrize("method", ["secateur", "slimllm", "flap", "piem-lsps", "magnitude"])
def test_streamed_layers_give_the_same_plan(method: str, source: Path, tmp_path: Path) -> None:
    spec, shape = spec_of(method), load(locate(str(source), allow_paths=True), "auto").shape
    chosen = resolved(spec, shape)
    assert streams(chosen)
    budget = estimate(chosen, shape, Place.RESIDENT).total - 1
    prune(str(source), spec, tmp_path / "resident", device=DEVICE)
    report = prune(str(source), spec, tmp_path / "streamed", device=DEVICE, device_memory_bytes=budget).report
    assert "streamed" in report["device"]
    assert kept_units(tmp_path / "resident") == kept_units(tmp_path / "streamed")


def test_after_want_of_memory_the_next_job_runs(source: Path, tmp_path: Path) -> None:
    with pytest.raises(PruningError) as caught:
        prune(str(source), spec_of("movement"), tmp_path / "small", device=DEVICE, device_memory_bytes=2**16)
    assert caught.value.code == ErrorCode.OUT_OF_MEMORY
    prune(str(source), spec_of("movement"), tmp_path / "whole", device=DEVICE)
