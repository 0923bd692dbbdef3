"""Sources whose layers differ: a model that was pruned in the layout ``per-layer`` is pruned again."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from secateur.catalog.inspection import layouts, structures
from secateur.catalog.resolve import resolve
from secateur.catalog.sources import locate, read_shape
from secateur.catalog.spec import Calibration, Evaluation, PruningSpec
from secateur.contract.errors import PruningError
from secateur.engine.model.loading import load
from secateur.engine.run.run import NamedModel, prune_to_folder
from tests.engine.models import VOCABULARY, english, make_model, save
from tests.tiers import slow_but


def spec(ratio: float, layout: str, method: str = "secateur") -> PruningSpec:
    return PruningSpec(
        target_ratio=ratio,
        method=method,
        layout=layout,
        calibration=Calibration(texts=english("calibration"), samples=4, sequence_length=32),
        evaluation=Evaluation(texts=english("evaluation"), samples=2, sequence_length=32, latency=False, prompts=[]),
        allocation={"width_multiple": 8},
    )


def first_generation(
    family: str, tokenizer: PreTrainedTokenizerFast, folder: Path, method: str = "secateur"
) -> tuple[Path, dict[str, Any]]:
    """A model of ``family`` pruned in the layout ``per-layer``, and its config."""
    source = save(make_model(family), tokenizer, folder / "source")
    prune_to_folder(NamedModel(str(source)), spec(0.2, "per-layer", method), folder / "first")
    return folder / "first", json.loads((folder / "first" / "config.json").read_text())


@pytest.mark.parametrize("family", slow_but(["mixtral"], ["qwen2", "phi3", "mixtral"]))
@pytest.mark.parametrize("layout", ["per-layer", "padded", "uniform"])
def test_a_pruned_model_is_pruned_again(
    family: str, layout: str, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    """Each export compares its logits and what it generates in a fresh process."""
    first, _ = first_generation(family, tokenizer, tmp_path)
    shape = read_shape(locate(str(first), allow_paths=True))
    assert len(set(shape.layers)) > 1 and shape.differs
    ratio = shape.nearest_ratio(0.4, 8, uniform=True) if layout == "uniform" else 0.4
    (report,) = prune_to_folder(NamedModel(str(first)), spec(ratio, layout), tmp_path / "second")
    assert [(each.kv_groups, each.channels) for each in report.widths.before] == [
        (layer.kv_groups, layer.channels_per_expert) for layer in shape.layers
    ]
    written = json.loads((tmp_path / "second" / "config.json").read_text())
    assert ("per_layer_config" in written) == ("added_biases" in written) == (layout == "per-layer")
    if layout == "uniform":
        assert len({(each.kv_groups, each.channels) for each in report.widths.after}) == 1
    else:
        assert report.ratio.reached == pytest.approx(0.4, abs=0.02)


def test_heads_that_no_stock_class_takes_leave_the_layout_uniform(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    """GPT-2 takes its own number of heads alone, which no layer of this source has."""
    first, config = first_generation("gpt2", tokenizer, tmp_path, "magnitude")
    shape = read_shape(locate(str(first), allow_paths=True))
    assert not shape.fits_uniform
    assert {each.layout: each.max_ratio for each in layouts(shape, config)}["uniform"] == 0
    kv_groups = next(each for each in structures(shape, config) if each.structure == "kv_groups")
    assert kv_groups.without_code == ["padded"]
    with pytest.raises(PruningError) as caught:
        resolve(spec(0.4, "uniform", "magnitude"), shape, config=config, source_dtype="float32")
    assert (caught.value.code, caught.value.field) == ("ratio_unreachable", "layout")


def test_it_is_loaded_without_its_code_and_computes_the_same(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    first, config = first_generation("llama", tokenizer, tmp_path, "flap")
    assert config["added_biases"], "flap adds biases, for which the stock class has no place"
    stranger = AutoModelForCausalLM.from_pretrained(first, trust_remote_code=True)
    (first / "modeling_pruned.py").write_text("raise SystemExit('this file is never run')\n")
    decoder = load(locate(str(first), allow_paths=True), "auto")
    tokens = torch.arange(40).view(2, 20) * 7 % VOCABULARY
    assert torch.allclose(decoder.model(tokens).logits, stranger(tokens).logits, atol=1e-5)
    assert type(decoder.model).__name__ == "LlamaForCausalLM"
    assert decoder.projection_parameters == decoder.shape.prunable_parameters
    for layout, code in (("padded", "recovery_unsupported"), ("uniform", "recovery_unsupported")):
        with pytest.raises(PruningError, match="got biases") as caught:
            resolve(spec(0.4, layout), decoder.shape, config=config, source_dtype="float32")
        assert (caught.value.code, caught.value.field) == (code, "layout")
    request = PruningSpec(target_ratio=0.4, method="dsgp")
    with pytest.raises(PruningError, match="layers are alike") as caught:
        resolve(request, decoder.shape, config=config, source_dtype="float32")
    assert caught.value.code == "method_unsupported"
