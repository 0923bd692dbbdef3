"""Mixtures of experts in which some layers have one feed-forward network, and no router."""

import json
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from secateur.catalog.architectures import shape_from_config
from secateur.catalog.inspection import layouts, structures
from secateur.catalog.resolve import resolve
from secateur.catalog.spec import Calibration, Evaluation, PruningSpec
from secateur.contract.errors import PruningError
from secateur.contract.events import Event, StepEvent
from secateur.engine.model.cutting import apply_plan
from secateur.engine.model.plan import Plan
from secateur.engine.run.run import NamedModel, prune_to_folder
from secateur.engine.run.workspace import Listener, Workspace
from secateur.engine.structures import STRUCTURES, WIDTHS, gated
from tests.engine.models import VOCABULARY, decoder_of, english, layer_plan, make_model, save
from tests.tiers import slow_but

DENSE: dict[str, tuple[dict[str, Any], list[int]]] = {
    "the-first": ({"mlp_only_layers": [0]}, [0]),
    "every-other": ({"decoder_sparse_step": 2, "mlp_only_layers": [3]}, [0, 2, 3]),
}
SIZES: dict[str, Any] = {"num_hidden_layers": 4, "num_experts": 4, "intermediate_size": 96, "moe_intermediate_size": 64}
TOKENS = torch.randint(VOCABULARY, (2, 40), generator=torch.Generator().manual_seed(3))


def model(kind: str) -> Any:
    return make_model("qwen3-moe", **SIZES, **DENSE[kind][0])


def spec(**changes: Any) -> PruningSpec:
    plain = {
        "method": "secateur",
        "rounds": 1,
        "allocation": {"width_multiple": 8},
        "calibration": Calibration(texts=english("calibration"), samples=8, sequence_length=32),
        "evaluation": Evaluation(texts=english("evaluation"), samples=4, sequence_length=32, latency=False, prompts=[]),
    }
    return PruningSpec(**{**plain, **changes})


def pruned(source: Path, folder: Path, **changes: Any) -> tuple[Any, dict[str, Any], Any]:
    """The report, the config, and the model as a stranger loads it. The export compares logits in a fresh process."""
    (report,) = prune_to_folder(NamedModel(str(source)), spec(**changes), folder)
    config = json.loads((folder / "config.json").read_text())
    loaded = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code="auto_map" in config)
    return report, config, loaded


@pytest.mark.parametrize("kind", DENSE)
def test_sizes_and_cuts(kind: str, tokenizer: PreTrainedTokenizerFast) -> None:
    decoder, dense = decoder_of(model(kind), tokenizer), DENSE[kind][1]
    shape = decoder.shape
    assert [layer.experts for layer in shape.layers] == [1 if index in dense else 4 for index in range(4)]
    assert [layer.channels_per_expert for layer in shape.layers] == [96 if index in dense else 64 for index in range(4)]
    assert decoder.widths == list(shape.layers) and not shape.differs
    assert shape.parameters == decoder.parameters
    assert shape.prunable_parameters == decoder.projection_parameters
    assert [STRUCTURES["experts"].units(layer) for layer in decoder.layers] == [
        0 if index in dense else 4 for index in range(4)
    ]
    kept = [
        layer_plan((0, 2), [e * layer.channels_per_expert + c for e in range(layer.experts) for c in range(e, 40 + e)])
        for layer in shape.layers
    ]
    with ExitStack() as stack:
        for layer, own in zip(decoder.layers, kept, strict=True):
            gates = {name: torch.zeros(1, structure.units(layer)) for name, structure in WIDTHS.items()}
            for name, gate in gates.items():
                gate[0, list(own[name])] = 1
            stack.enter_context(gated(layer, gates))
        masked = decoder.model(TOKENS).logits
    apply_plan(decoder, Plan(tuple(kept)))
    assert torch.allclose(decoder.model(TOKENS).logits, masked, atol=1e-4 * float(masked.abs().max()))


@pytest.mark.parametrize("kind", slow_but(["every-other"], DENSE))
def test_widths_are_cut_and_cut_again(kind: str, tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    source = save(model(kind), tokenizer, tmp_path / "source")
    report, config, loaded = pruned(source, tmp_path / "first", target_ratio=0.3)
    assert report.ratio.reached == pytest.approx(0.3, abs=0.01)
    assert config["intermediate_size"] == 96, "the size of the unpruned model, of which each layer has its own share"
    again, _, _ = pruned(tmp_path / "first", tmp_path / "second", target_ratio=0.2, method="piem-lsps")
    assert [(each.kv_groups, each.channels) for each in again.widths.before] == [
        (each.kv_groups, each.channels) for each in report.widths.after
    ]
    assert sum(parameter.numel() for parameter in loaded.parameters()) == again.parameters.before


@pytest.mark.parametrize("kind", slow_but(["every-other"], DENSE))
def test_whole_layers_and_experts_leave_a_stock_class(
    kind: str, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    source, dense = save(model(kind), tokenizer, tmp_path / "source"), DENSE[kind][1]
    shape = shape_from_config(json.loads((source / "config.json").read_text()))
    report, config, loaded = pruned(source, tmp_path / "layers", target_ratio=0.25, structures=["layers"])
    (gone,) = [index for index, each in enumerate(report.widths.after) if not each.kv_groups]
    left = [index for index in range(4) if index != gone]
    assert "auto_map" not in config and config["num_hidden_layers"] == 3
    assert [hasattr(layer.mlp, "experts") for layer in loaded.model.layers] == [index not in dense for index in left]

    share = sum(shape.price("experts", index) for index in range(4) if index not in dense) / shape.prunable_parameters
    report, config, loaded = pruned(
        source, tmp_path / "experts", target_ratio=share, structures=["experts"], scoring={"kind": "reap"}
    )
    assert "auto_map" not in config and config["num_experts"] == 3
    assert [each.experts for each in report.widths.after] == [1 if index in dense else 3 for index in range(4)]
    assert [layer.mlp.gate_proj.out_features for layer in loaded.model.layers if not hasattr(layer.mlp, "experts")] == [
        96
    ] * len(dense)


def test_a_run_resumes_from_every_step(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    """The tensors of a recovered layer have the names of its own kind."""
    source = save(model("the-first"), tokenizer, tmp_path / "source")
    asked, states = spec(target_ratio=0.3, rounds=2), list[Any]()

    class Kept(Listener):
        def on_event(self, event: Event) -> None:
            if isinstance(event, StepEvent):
                states.append(event.state)

    workspace = Workspace(allow_paths=True, scratch=tmp_path)
    prune_to_folder(NamedModel(str(source)), asked, tmp_path / "whole", workspace, Kept())
    for number, state in enumerate(states[:-1]):
        out = tmp_path / f"resumed-{number}"
        prune_to_folder(NamedModel(str(source)), asked, out, workspace, resume=state)
        expected, found = (load_file(folder / "model.safetensors") for folder in (tmp_path / "whole", out))
        assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def test_layers_of_unequal_price_leave_what_was_asked_for(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    source = save(model("every-other"), tokenizer, tmp_path / "source")
    for method in ("shortgpt", "sleb"):
        report, _, _ = pruned(source, tmp_path / method, target_ratio=0.5, structures=["layers"], method=method)
        shape = shape_from_config(json.loads((source / "config.json").read_text()))
        largest = max(shape.price("layers", index) for index in range(4)) / shape.prunable_parameters
        assert abs(report.ratio.reached - 0.5) <= largest / 2 + 1e-9


@pytest.mark.parametrize("layout", ["uniform", "padded"])
def test_layers_of_both_kinds_are_never_alike(layout: str) -> None:
    config = model("the-first").config.to_dict()
    shape = shape_from_config(config)
    with pytest.raises(PruningError, match="differ in more") as caught:
        resolve(spec(target_ratio=0.3, layout=layout), shape, config=config, source_dtype="float32")
    assert (caught.value.code, caught.value.field) == ("ratio_unreachable", "layout")
    told = {each.layout: (each.max_ratio, each.gguf_reason) for each in layouts(shape, config)}
    assert told[layout][0] == 0 < told["per-layer"][0]
    assert all("some have none" in str(reason) for _, reason in told.values())
    assert {each.structure: each.without_code for each in structures(shape, config)} == {
        "layers": ["per-layer"],
        "attention": [],
        "feed_forward": [],
        "experts": ["per-layer"],
        "kv_groups": [],
        "channels": [],
        "vocabulary": ["per-layer"],
    }
