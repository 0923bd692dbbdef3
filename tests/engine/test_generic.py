"""Models of families without an adapter: what is built like Llama is found out, verified and pruned; the rest refused."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    GPTJConfig,
    Olmo2Config,
    PreTrainedConfig,
    PreTrainedTokenizerFast,
    Qwen2MoeConfig,
)

from secateur.catalog.sources import locate
from secateur.catalog.spec import PruningSpec
from secateur.contract.errors import PruningError
from secateur.engine.model.decoder import Decoder
from secateur.engine.model.generic import verify
from secateur.engine.model.loading import load
from tests.engine.models import LIKE_LLAMA, SIZES, make_model, save
from tests.engine.running import prune

QUICK = ("cohere", "granite", "starcoder2")
"""A scale of the logits and a parallel part; scales of everything; a plain feed-forward part and biases. The rest is slow."""


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in LIKE_LLAMA]
)
def test_what_is_built_like_llama_can_be_pruned(name: str, tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    """With the check of the written checkpoint by a process that never saw this."""
    folder = save(make_model(name), tokenizer, tmp_path / "source")
    decoder = load(locate(str(folder), allow_paths=True), "auto")
    assert decoder.shape.family.name == "generic"
    assert decoder.shape.parameters == decoder.parameters
    assert decoder.shape.prunable_parameters == decoder.projection_parameters
    text = {"texts": ["The river runs past the old mill. " * 40], "samples": 4, "sequence_length": 32}
    spec = PruningSpec(
        target_ratio=0.4,
        method="secateur",
        calibration=text,
        evaluation={**text, "latency": False},
        allocation={"width_multiple": 8},
    )
    report = prune(str(folder), spec, tmp_path / "out").report
    assert report["source"]["family"] == "generic"
    assert report["ratio"]["reached"] == pytest.approx(0.4, abs=0.02)


@pytest.mark.parametrize(
    ("config_class", "own", "reason"),
    [
        (Olmo2Config, {}, "k_norm"),  # a norm over all heads
        (
            Olmo2Config,
            {"num_key_value_heads": 6},
            "does not run when it is cut",
        ),  # the same, as wide as the hidden states
        (Qwen2MoeConfig, {"num_experts": 4}, "mixture of experts"),
        (GPTJConfig, {"n_embd": 48, "n_head": 6, "n_layer": 3, "rotary_dim": 4}, "'hidden_size'"),
    ],
)
def test_what_is_not_is_refused_by_its_reason(
    config_class: type[PreTrainedConfig],
    own: dict[str, Any],
    reason: str,
    tokenizer: PreTrainedTokenizerFast,
    tmp_path: Path,
) -> None:
    model = AutoModelForCausalLM.from_config(config_class(**{**SIZES, **own}))
    folder = save(model, tokenizer, tmp_path / "source")
    config = json.loads((folder / "config.json").read_text())
    if reason == "'hidden_size'":
        (folder / "config.json").write_text(json.dumps({k: v for k, v in config.items() if k not in SIZES}))
    with pytest.raises(PruningError, match=reason) as caught:
        load(locate(str(folder), allow_paths=True), "auto")
    assert caught.value.code == "unsupported_architecture"


def test_a_model_that_is_not_what_it_seems_is_refused(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    folder = save(make_model("olmo"), tokenizer, tmp_path / "source")
    decoder = load(locate(str(folder), allow_paths=True), "auto")
    verify(decoder)
    mlp = decoder.layers[1].module.get_submodule("mlp")
    mlp.register_forward_hook(lambda _, args, output: output + args[0])  # gives something that no channel does
    verify(decoder)  # which is no matter: channels still do what they did
    attention = decoder.layers[1].attention_output
    attention.register_forward_pre_hook(lambda _, args: (args[0].roll(8, -1),))
    with pytest.raises(PruningError, match="cutting kv_groups of layer 1"):
        verify(decoder)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_verifying_leaves_the_model_as_it_was(
    dtype: torch.dtype, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    """The model has 12 layers, over which the roundings of half precision would add up."""
    folder = save(make_model("starcoder2", num_hidden_layers=12).to(dtype), tokenizer, tmp_path / "source")
    decoder = load(locate(str(folder), allow_paths=True), "auto")
    before = {name: tensor.clone() for name, tensor in decoder.model.state_dict().items()}
    verify(decoder)
    after = decoder.model.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert all(
        (module.out_features, module.in_features) == tuple(module.weight.shape)
        for module in decoder.model.modules()
        if isinstance(module, nn.Linear)
    )
    assert isinstance(decoder, Decoder)
