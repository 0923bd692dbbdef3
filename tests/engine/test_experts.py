"""Mixtures of experts: each expert gives as many channels, its own; what has no place in one is refused."""

import copy
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from gguf import GGUFWriter
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from secateur.catalog.architectures import shape_from_config
from secateur.catalog.methods import LAYERWISE_RECOVERIES, METHODS, STATIC_METHODS
from secateur.catalog.sources import locate
from secateur.catalog.spec import PruningSpec
from secateur.contract.errors import PruningError
from secateur.engine.allocation.schedule import round_goals
from secateur.engine.evaluation import forward_flops
from secateur.engine.measure.layer_stream import LayerStream
from secateur.engine.model.decoder import Decoder, token_losses
from secateur.engine.model.loading import load
from secateur.engine.run.rounds import prune_round
from secateur.engine.scoring import Context
from secateur.engine.scoring.taylor import gradients_from_the_end, unit_weights
from tests.engine.models import VOCABULARY, decoder_of, make_model, save
from tests.engine.running import prune, resolved
from tests.tiers import slow_but

TOKENS = torch.randint(VOCABULARY, (6, 32), generator=torch.Generator().manual_seed(2))
NAMES = ["mixtral", "qwen3-moe"]


@pytest.mark.parametrize("name", NAMES)
def test_taken_apart_it_is_the_module_it_was(name: str, tokenizer: PreTrainedTokenizerFast) -> None:
    stock = make_model(name)
    state, logits = {key: value.clone() for key, value in stock.state_dict().items()}, stock(TOKENS).logits
    decoder = decoder_of(stock, tokenizer)
    assert torch.allclose(decoder.model(TOKENS).logits, logits, atol=1e-4)
    with decoder.routed():
        assert torch.allclose(decoder.model(TOKENS).logits, logits, atol=1e-4)
    again = stock.state_dict()
    assert again.keys() == state.keys() and all(torch.equal(again[key], state[key]) for key in state)


@pytest.mark.parametrize("method", slow_but(["secateur", "piem-lsps", "magnitude"], STATIC_METHODS))
def test_every_expert_gives_its_own_lowest(method: str, tokenizer: PreTrainedTokenizerFast) -> None:
    whole = decoder_of(make_model("mixtral"), tokenizer)
    pruned = Decoder(copy.deepcopy(whole.model), tokenizer, whole.shape)
    biased = LAYERWISE_RECOVERIES[METHODS[method].layerwise_recovery].adds_bias
    recovery = {"layerwise": {"kind": "none"}} if biased else {}
    asked = resolved(PruningSpec(target_ratio=0.4, method=method, rounds=1, recovery=recovery), whole.shape)
    (target,) = round_goals(whole.shape, 0.4, 1, "geometric", 32)
    reference = pruned if asked.components.fits_to_reference else None
    context = Context(pruned, TOKENS, 2, asked, 0.4, 1, lambda share: None, reference=reference)
    plan = prune_round(context, target)
    block = 16 * whole.shape.price("channels", 0) / whole.shape.prunable_parameters
    assert abs(pruned.reached_ratio - 0.4) <= block + 1e-9
    differ = False
    for index, (layer, kept) in enumerate(zip(pruned.layers, plan.layers, strict=True)):
        width, by_expert = layer.shape.channels_per_expert, torch.tensor(kept["channels"]).view(4, -1)
        assert by_expert.shape == (4, width) and bool((by_expert // 160 == torch.arange(4)[:, None]).all())
        differ |= bool((by_expert % 160 != by_expert[0] % 160).any())
        if context.scores is not None and width < 160:
            for scores, own in zip(context.scores["channels"][index].chunk(4), by_expert % 160, strict=True):
                gone = torch.ones(160, dtype=torch.bool)
                gone[own] = False
                assert scores[gone].max() <= scores[own].min()
    assert differ, "experts choose for themselves"


@pytest.mark.parametrize("reference", [False, True])
def test_moments_are_each_experts_own(reference: bool, tokenizer: PreTrainedTokenizerFast) -> None:
    """Against the stock module's own arithmetic, token by token."""
    stock, decoder = make_model("mixtral"), decoder_of(make_model("mixtral"), tokenizer)
    whole = decoder_of(make_model("mixtral"), tokenizer)
    with torch.no_grad():  # so that something is missing
        decoder.layers[0].attention_output.weight.mul_(0.9)
    block = stock.model.layers[0].mlp
    stream = LayerStream(decoder, TOKENS, 2, whole if reference else None)
    next(iter(stream.layers()))
    found = stream.moments("channels")
    states: dict[str, Tensor] = {}
    hooks = [
        owner.register_forward_hook(lambda _, args, out, key=key: states.update({key: out, f"{key}-in": args[0]}))
        for key, owner in {
            "before": decoder.layers[0].module.get_submodule("mlp"),
            "layer": decoder.layers[0].module,
            "whole": whole.layers[0].module,
        }.items()
    ]
    decoder.model(TOKENS)
    whole.model(TOKENS)
    for hook in hooks:
        hook.remove()
    flat = {key: (out[0] if isinstance(out, tuple) else out).reshape(-1, 48) for key, out in states.items()}
    _, weights, sent = block.gate(flat["before-in"])
    experts = block.experts
    scale = 1 / flat["whole"].square().mean(1) if reference else torch.ones(len(sent))
    for expert, moments in enumerate(found):
        gram, missing, entering = torch.zeros(160, 160), torch.zeros(160, 48), torch.zeros(48)
        for token, row in enumerate(sent.tolist()):
            if expert not in row:
                continue
            hidden = flat["before-in"][token]
            gate, up = (experts.gate_up_proj[expert] @ hidden).chunk(2)
            inputs = torch.nn.functional.silu(gate) * up * weights[token, row.index(expert)]
            gram += scale[token] * torch.outer(inputs, inputs)
            missing += scale[token] * torch.outer(inputs, (flat["whole"] - flat["layer"])[token]) / 2
            entering += scale[token] * hidden.square()
        assert torch.allclose(moments.gram, gram, rtol=1e-3, atol=1e-4 * float(gram.max()))
        assert torch.allclose(moments.entering, entering, rtol=1e-3)
        if reference:
            assert moments.missing is not None
            assert float((moments.missing - missing).norm() / missing.norm()) < 1e-3


@pytest.mark.parametrize("name", NAMES)
def test_gradients_are_the_stock_modules(name: str, tokenizer: PreTrainedTokenizerFast) -> None:
    stock, decoder = make_model(name), decoder_of(make_model(name), tokenizer)
    stock.set_experts_implementation("eager")
    weights = [layer.mlp.experts for layer in stock.model.layers]
    loss = token_losses(stock.requires_grad_(True)(TOKENS).logits, TOKENS).mean()
    expected = torch.autograd.grad(loss, [weight for own in weights for weight in (own.gate_up_proj, own.down_proj)])
    leaves = [unit_weights(layer) for layer in decoder.layers]
    for index, found in gradients_from_the_end(decoder, [TOKENS[:4], TOKENS[4:]], leaves):
        (gate,), (up,), (down,) = (found[f"mlp.experts.{kind}"] for kind in ("gate", "up", "down"))
        gate_up, rows = expected[2 * index : 2 * index + 2]
        for one, other in (
            (torch.cat([gate.view(len(gate_up), -1, 48), up.view(len(gate_up), -1, 48)], 1), gate_up),
            (down.view(48, len(rows), -1).transpose(0, 1), rows),
        ):
            assert float((one - other).norm() / other.norm()) < 1e-4


def test_a_whole_job(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    """With training on top, whose projections are those of all experts at once."""
    source = save(make_model("qwen3-moe"), tokenizer, tmp_path / "source")
    spec = PruningSpec(
        target_ratio=0.3,
        method="secateur",
        allocation={"width_multiple": 16},
        recovery={"training": {"kind": "lora", "epochs": 1}},
        calibration={"samples": 8, "sequence_length": 32},
        evaluation={"samples": 4, "sequence_length": 32},
    )
    report = prune(str(source), spec, tmp_path / "out").report
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out", trust_remote_code=True)
    assert sum(parameter.numel() for parameter in loaded.parameters()) == report["parameters"]["after"]
    assert report["flops"]["after"] < report["flops"]["before"]
    assert {layer.mlp.experts.down_proj.shape[2] for layer in loaded.model.layers} == {
        width["channels"] for width in report["widths"]["after"]
    }


def test_floating_point_operations_are_those_of_the_experts_that_run(tokenizer: PreTrainedTokenizerFast) -> None:
    mixture, dense = (
        decoder_of(make_model(name), tokenizer) for name in ("mixtral", "mistral")
    )  # mistral has one such network, a token of mixtral's passes two
    more = forward_flops(mixture, 16) - forward_flops(dense, 16)
    assert more == 2 * 16 * 3 * 3 * 48 * 160, "tokens, layers, projections"


REFUSED: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "biases": ({}, {"method": "slimllm"}, "recovery_unsupported"),
    "gguf": ({}, {"formats": ["safetensors", "gguf"]}, "gguf_unsupported"),
    "a dense layer that the weights lack": ({"mlp_only_layers": [1]}, {}, "weights_missing"),
    "a step that is none": ({"decoder_sparse_step": 0}, {}, "config_invalid"),
    "no experts": ({"num_local_experts": 0}, {}, "config_invalid"),
    "more a token than there are": ({"num_experts_per_tok": 4}, {}, "config_invalid"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_has_no_place_is_refused(case: str, tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    changes, request, code = REFUSED[case]
    source = save(make_model("qwen3-moe"), tokenizer, tmp_path / "source")
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**config, **changes}))
    with pytest.raises(PruningError) as caught:
        prune(str(source), PruningSpec(**{"target_ratio": 0.3, "method": "secateur", **request}), tmp_path / "out")
    assert caught.value.code == code and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("change", "code", "named"),
    [
        ("drop", "weights_missing", "layers.1.mlp.experts.2.up_proj.weight"),
        ("shorten", "config_invalid", "layers.1.mlp.experts.2.up_proj.weight"),
        ("add", "config_invalid", "layers.1.mlp.experts.3.up_proj.weight"),
        ("drop router", "weights_missing", "layers.1.mlp.gate.weight"),
    ],
)
def test_a_wrong_tensor_is_named(
    change: str, code: str, named: str, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    source = save(make_model("qwen3-moe"), tokenizer, tmp_path / "source")
    weights = load_file(source / "model.safetensors")
    name = f"model.{named}"
    match change:
        case "shorten":
            weights[name] = weights[name][:-8].contiguous()
        case "add":
            weights[name] = weights[name.replace(".3.", ".2.")].clone()
        case _:
            del weights[name]
    save_file(weights, source / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(PruningError, match=re.escape(named)) as caught:
        load(locate(str(source), allow_paths=True), "auto")
    assert caught.value.code == code


def test_a_gguf_file_of_one_is_refused(tmp_path: Path) -> None:
    writer = GGUFWriter(tmp_path / "mixture.gguf", "llama")
    writer.add_expert_count(4)
    writer.add_token_list(["a", "b"])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(PruningError, match="from safetensors alone") as caught:
        locate(str(tmp_path / "mixture.gguf"), allow_paths=True)
    assert caught.value.code == "unsupported_architecture"


def test_either_name_of_the_number_of_experts_is_read() -> None:
    config = make_model("qwen3-moe").config.to_dict()
    count = config.pop("num_local_experts")
    assert shape_from_config({**config, "num_experts": count}).layers[0].experts == 3
