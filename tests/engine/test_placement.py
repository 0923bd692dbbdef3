"""Layers that are streamed to a device or spread over devices give the plans and the weights of layers that stay on one."""

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast

from secateur.catalog.memory import Place, estimate
from secateur.catalog.sources import locate
from secateur.catalog.spec import PruningSpec
from secateur.contract.errors import ErrorCode, PruningError
from secateur.engine.model.loading import load
from secateur.engine.model.placement import Placement, Sharded, Streamed
from secateur.engine.run import run
from tests.engine.models import english, make_model, save
from tests.engine.running import prune, resolved

CPU = torch.device("cpu")
LAYERS = 6


def write(folder: Path, family: str, tokenizer: PreTrainedTokenizerFast) -> Path:
    sizes = {"n_layer": LAYERS} if family == "gpt2" else {"num_hidden_layers": LAYERS}
    return save(make_model(family, **sizes), tokenizer, folder)


def spec_of(method: str, **fields: Any) -> PruningSpec:
    size = {"samples": 8, "sequence_length": 32}
    return PruningSpec.model_validate(
        {
            "method": method,
            "target_ratio": 0.4,
            "rounds": 2,
            "calibration": {"texts": english("calibration"), **size},
            "evaluation": {"texts": english("evaluation"), **size, "latency": False, "prompts": []},
            **fields,
        }
    )


def outcome(
    source: Path, spec: PruningSpec, out: Path, **workspace: Any
) -> tuple[dict[str, Any], Any, dict[str, Tensor]]:
    """The report, the plan and the weights."""
    pruned = prune(str(source), spec, out, **workspace)
    plan = json.loads((out / "secateur.json").read_text())["plan"]
    return pruned.report, plan, load_file(out / "model.safetensors")


def assert_same(one: tuple[Any, Any, dict[str, Tensor]], other: tuple[Any, Any, dict[str, Tensor]]) -> None:
    assert one[1] == other[1]
    assert one[2].keys() == other[2].keys()
    for name, tensor in one[2].items():
        torch.testing.assert_close(tensor, other[2][name])
    assert one[0]["perplexity"]["after"] == pytest.approx(other[0]["perplexity"]["after"])


@pytest.mark.parametrize(
    ("family", "method"),
    [("llama", method) for method in ("secateur", "slimllm", "flap", "piem-lsps", "wanda", "magnitude")]
    + [("gemma2", "flap"), ("gpt2", "secateur"), ("qwen3-moe", "secateur"), ("phi3", "secateur")],
)
def test_streamed_layers_give_the_same_model(
    family: str, method: str, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    source, spec = write(tmp_path / "source", family, tokenizer), spec_of(method)
    shape = load(locate(str(source), allow_paths=True), "auto").shape
    resident = estimate(resolved(spec, shape), shape, Place.RESIDENT).total
    resting = outcome(source, spec, tmp_path / "resident", device="cpu")
    streamed = outcome(source, spec, tmp_path / "streamed", device="cpu", device_memory_bytes=resident - 1)
    assert resting[0]["device"] == "cpu" and streamed[0]["device"] == "cpu (layers streamed from the host)"
    assert_same(resting, streamed)


@pytest.mark.parametrize(("removed", "ratio"), [("layers", 1 / 3), ("attention", 0.1)])
def test_streamed_blocks_are_compensated_for(
    removed: str, ratio: float, tokenizer: PreTrainedTokenizerFast, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = write(tmp_path / "source", "llama", tokenizer)
    spec = spec_of("secateur", rounds=1, structures=[removed], target_ratio=ratio)
    resting = outcome(source, spec, tmp_path / "resident", device="cpu")
    monkeypatch.setattr(run, "choose_placement", lambda *given: partial(Streamed, CPU))
    assert_same(resting, outcome(source, spec, tmp_path / "streamed", device="cpu"))


@pytest.mark.parametrize("method", ["secateur", "piem-lsps", "llm-pruner"])
def test_two_devices_give_the_model_of_one(
    method: str, tokenizer: PreTrainedTokenizerFast, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, spec, hops = write(tmp_path / "source", "llama", tokenizer), spec_of(method), []

    def move(given: Any, device: torch.device) -> Any:
        hops.append(device)
        return given

    resting = outcome(source, spec, tmp_path / "one", device="cpu")
    monkeypatch.setattr(run, "choose_placement", lambda *given: partial(Sharded, [CPU, CPU], move))
    spread = outcome(source, spec, tmp_path / "two", device="cpu")
    assert spread[0]["device"] == "cpu, cpu (layers spread over 2 devices)" and hops
    assert_same(resting, spread)


def test_layers_are_spread_evenly() -> None:
    class Noted(nn.Linear):
        def to(self, *given: Any, **named: Any) -> Any:
            self.device = given[0]
            return self

    layers = nn.ModuleList(Noted(8, 8) for _ in range(8))
    model = nn.ModuleDict({"embedding": nn.Embedding(16, 8), "layers": layers})
    devices = [torch.device("cpu"), torch.device("meta")]
    Sharded(devices).place(model, layers)
    assert [str(layer.device) for layer in layers] == ["cpu"] * 3 + ["meta"] * 5, "the first holds the embeddings, too"


@pytest.mark.parametrize(
    ("fields", "reason"), [({"method": "movement"}, "gradients"), ({"training": True}, "training")]
)
def test_what_needs_all_layers_at_once_is_refused(
    fields: dict[str, Any], reason: str, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    source = write(tmp_path / "source", "llama", tokenizer)
    training = {"recovery": {"training": {"kind": "lora", "epochs": 1}}} if fields.pop("training", None) else {}
    with pytest.raises(PruningError) as caught:
        prune(
            str(source),
            spec_of(**{"method": "secateur", **fields, **training}),
            tmp_path / "out",
            device_memory_bytes=2**20,
        )
    assert caught.value.code == ErrorCode.OUT_OF_MEMORY, reason


class Streams:
    """A stack of layers that is streamed on the CPU."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.layers = [nn.Linear(8, 8).requires_grad_(False) for _ in range(5)]
        modules = nn.ModuleList(self.layers)
        self.placement = Streamed(CPU)
        self.size = sum(parameter.nbytes for parameter in self.layers[0].parameters())
        self.given = torch.randn(2, 8)
        self.expected = self.run()
        self.placement.place(nn.ModuleDict({"layers": modules}), modules)

    def run(self) -> Tensor:
        hidden = self.given
        for layer in self.layers:
            hidden = layer(hidden)
        return hidden


def test_the_device_has_the_layer_that_runs_and_the_next() -> None:
    stack = Streams()
    for _ in range(2):
        assert torch.equal(stack.run(), stack.expected)
    assert stack.placement.most_bytes == 2 * stack.size


@pytest.mark.parametrize("kept", [True, False])
def test_changes_reach_the_host(kept: bool) -> None:
    stack = Streams()
    stack.run()
    layer, before = stack.layers[1], stack.layers[1].weight
    stack.layers[0](stack.given)  # the next layer is copied ahead
    if kept:
        with stack.placement.at_hand(layer):
            assert layer.weight is not before, "the copy on the device"
            layer.weight.mul_(2)
            layer.register_parameter("bias", None)
        assert layer.weight is not before and torch.equal(layer.weight, 2 * before)
    else:
        layer.weight.mul_(2)
        layer.register_parameter("bias", None)
    assert torch.equal(layer(stack.given), stack.given @ layer.weight.T) and layer.bias is None


def test_a_failing_layer_leaves_the_device() -> None:
    stack = Streams()
    before = stack.layers[1].weight
    with pytest.raises(RuntimeError):
        stack.layers[1](torch.zeros(2, 3))
    assert stack.layers[1].weight is before
    assert torch.equal(stack.run(), stack.expected)


def test_a_plain_placement_leaves_layers_where_they_are() -> None:
    stack = Streams()
    with Placement(CPU).at_hand(stack.layers[0]):
        assert torch.equal(stack.run(), stack.expected)
