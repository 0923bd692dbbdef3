"""Every family through whole rounds, and modules of several projections taken apart."""

import copy
import json

import pytest
import torch
from torch import nn
from transformers import PreTrainedTokenizerFast

from secateur.catalog.architectures import shape_from_config
from secateur.catalog.methods import LAYERWISE_RECOVERIES, METHODS
from secateur.catalog.spec import PruningSpec
from secateur.engine.allocation.schedule import round_goals
from secateur.engine.model.decoder import Decoder
from secateur.engine.model.fused import Fused
from secateur.engine.run.rounds import prune_round
from secateur.engine.scoring import Context
from tests.engine.models import FAMILIES, VOCABULARY, decoder_of, make_model
from tests.engine.running import resolved
from tests.tiers import slow_but

TOKENS = torch.randint(VOCABULARY, (6, 32), generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize(
    "method", slow_but(["secateur", "piem-lsps"], ["secateur", "slimllm", "flap", "piem-lsps", "loraprune"])
)
@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_can_be_pruned(name: str, method: str, tokenizer: PreTrainedTokenizerFast) -> None:
    whole = decoder_of(make_model(name), tokenizer)
    pruned = Decoder(copy.deepcopy(whole.model), tokenizer, whole.shape)
    biased = LAYERWISE_RECOVERIES[METHODS[method].layerwise_recovery].adds_bias
    recovery = {"layerwise": {"kind": "none"}} if whole.shape.family.experts and biased else {}
    asked = resolved(PruningSpec(target_ratio=0.4, method=method, rounds=2, recovery=recovery), whole.shape)
    for number, target in enumerate(round_goals(whole.shape, 0.4, 2, "geometric", 32), start=1):
        reference = whole if asked.components.fits_to_reference else None
        context = Context(pruned, TOKENS, 2, asked, 0.4, number, lambda share: None, reference=reference)
        prune_round(context, target)
    half_a_block = 16 * whole.shape.price("channels", 0) / whole.shape.prunable_parameters
    assert abs(pruned.reached_ratio - 0.4) <= half_a_block + 1e-9
    assert pruned.prunable_parameters == whole.shape.prunable_parameters - round(
        pruned.reached_ratio * whole.shape.prunable_parameters
    )
    logits, before = pruned.model(TOKENS).logits, whole.model(TOKENS).logits
    assert bool(logits.isfinite().all()) and not torch.allclose(logits, before)
    with pruned.routed():
        assert torch.allclose(pruned.model(TOKENS).logits, logits, atol=1e-3)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_config_file_says_what_the_model_has(name: str) -> None:
    """Also one that leaves out what the config's class assumes."""
    model = make_model(name)
    shape = shape_from_config(json.loads(model.config.to_json_string()))
    assert shape.parameters == sum(parameter.numel() for parameter in model.parameters())
    short = json.loads(type(model.config)().to_json_string(use_diff=True))
    full = type(model.config)()
    assumed = shape_from_config({**short, "num_hidden_layers": 1, "per_layer_config": None})
    assert assumed.layers[0].head_dim == (
        getattr(full, "head_dim", None) or full.hidden_size // full.num_attention_heads
    )
    assert assumed.tied_embeddings == full.tie_word_embeddings


@pytest.mark.parametrize("bias", [False, True])
def test_fused_is_the_module_it_was(bias: bool) -> None:
    linear = nn.Linear(8, 15, bias=bias)
    fused = Fused(linear, {"query": 9, "key": 3, "value": 3})
    hidden = torch.randn(2, 5, 8)
    assert torch.allclose(fused(hidden), linear(hidden), atol=1e-6)
    state = nn.Sequential(fused).state_dict()
    assert state.keys() == nn.Sequential(linear).state_dict().keys()
    assert all(torch.equal(state[f"0.{kind}"], tensor) for kind, tensor in linear.state_dict().items())
    assert fused.get_submodule("key").weight.shape == (3, 8)
