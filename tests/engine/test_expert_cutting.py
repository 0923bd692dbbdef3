"""Whole experts: scores against plain loops, and cutting against a router that never chooses the removed experts."""

import copy
import json
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from secateur.catalog.architectures import LayerShape
from secateur.catalog.architectures.mixtral import MIXTRAL
from secateur.catalog.sources import locate
from secateur.catalog.spec import PruningSpec
from secateur.catalog.structures import LayerCost
from secateur.contract.errors import PruningError
from secateur.engine.export.check import check_checkpoint
from secateur.engine.export.checkpoint import write_model
from secateur.engine.model.decoder import Decoder, Layer
from secateur.engine.model.loading import load
from secateur.engine.scoring.base import Context
from secateur.engine.scoring.experts import EXPERT_SCORERS
from secateur.engine.structures import WIDTHS, experts
from tests.engine.models import VOCABULARY, decoder_of, english, make_model, save, train
from tests.engine.running import resolved
from tests.tiers import slow_but

TOKENS = torch.randint(VOCABULARY, (5, 24), generator=torch.Generator().manual_seed(2))
MIXTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "mixtral": ("mixtral", {"num_local_experts": 6}),
    "qwen3-moe": ("qwen3-moe", {"num_experts": 6, "num_experts_per_tok": 3}),
    "qwen3-moe-normalised": ("qwen3-moe", {"num_experts": 6, "norm_topk_prob": True}),
}
KEPT: dict[str, list[Sequence[int]]] = {
    "as many in every layer": [(0, 2, 3, 5), (1, 2, 3, 4), (0, 1, 4, 5)],
    "other numbers": [(0, 2, 3, 5), range(6), (4, 5)],
    "fewer than a token is sent to": [(3,), (0,), (5,)],
}


def best(scores: Sequence[Tensor], counts: Sequence[int], layers: Sequence[Layer]) -> list[tuple[int, ...]]:
    """The experts that each layer keeps, as many as ``counts`` says."""
    structure = experts.WholeExperts()
    pairs = zip(layers, scores, counts, strict=True)
    return [structure.best(layer, own, count) if len(own) else () for layer, own, count in pairs]


def mixture(name: str, tokenizer: PreTrainedTokenizerFast) -> Decoder:
    family, changes = MIXTURES[name]
    return decoder_of(make_model(family, **changes), tokenizer)


def context_of(decoder: Decoder, tokens: Tensor = TOKENS, seed: int = 1) -> Context:
    asked = resolved(PruningSpec(target_ratio=0.3, method="magnitude"), decoder.shape)
    return Context(decoder, tokens, 2, asked, 0.3, seed, lambda share: None)


class _Shield(TorchFunctionMode):
    """Sets the logits of some experts, those that the router's weight has rows for, to minus infinity."""

    def __init__(self, weight: Tensor, gone: list[int]) -> None:
        super().__init__()
        self.weight, self.gone = weight, gone

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = function(*args, **(kwargs or {}))
        if function is nn.functional.linear and given.shape[-1] == len(self.weight):
            given[..., self.gone] = -torch.inf
        return given


@contextmanager
def shielded(block: Any, kept: Iterable[int]) -> Iterator[None]:
    """Let the router of ``block`` choose among the experts ``kept`` alone, while the context lasts."""
    router: Any = getattr(block, "gate", None) or block.router
    weight = next(parameter for parameter in router.parameters() if parameter.dim() == 2 and len(parameter) > 1)
    gone = sorted(set(range(len(weight))) - set(kept))
    biases = [bias for owner in (block, *router.modules()) for name, bias in vars_of(owner) if "bias" in name]
    before = [bias.clone() for bias in biases]
    for bias in biases:
        bias[..., gone] = -torch.inf
    forward = router.forward

    def shielding(*args: Any, **kwargs: Any) -> Any:
        with _Shield(weight, gone):
            return forward(*args, **kwargs)

    router.forward = shielding
    try:
        yield
    finally:
        del router.forward
        for bias, own in zip(biases, before, strict=True):
            bias.copy_(own)


def vars_of(owner: nn.Module) -> list[tuple[str, Tensor]]:
    return [*owner.named_parameters(recurse=False), *owner.named_buffers(recurse=False)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kept", KEPT)
@pytest.mark.parametrize("name", MIXTURES)
def test_cut_equals_shielded(name: str, kept: str, dtype: torch.dtype, tokenizer: PreTrainedTokenizerFast) -> None:
    decoder = mixture(name, tokenizer)
    decoder.model.to(dtype)
    whole = decoder.model(TOKENS).logits
    with ExitStack() as stack:
        stack.enter_context(decoder.routed())
        for layer, own in zip(decoder.layers, KEPT[kept], strict=True):
            stack.enter_context(shielded(layer.module.mlp, own))
        expected = decoder.model(TOKENS).logits
    for layer, own in zip(decoder.layers, KEPT[kept], strict=True):
        experts.cut(layer, own)
    with decoder.routed():
        found = decoder.model(TOKENS).logits
    scale = float(expected.abs().max())
    assert torch.allclose(found, expected, atol=scale * (1e-5 if dtype == torch.float32 else 1e-2))
    if dtype == torch.float32:  # in half precision, another order of sums sends some tokens to other experts
        assert torch.allclose(decoder.model(TOKENS).logits, expected, atol=1e-4 * scale)
    assert not torch.allclose(expected, whole, atol=0.1 * scale)
    assert [layer.shape.experts for layer in decoder.layers] == [len(own) for own in KEPT[kept]]
    assert [layer.shape.channels_per_expert for layer in decoder.layers] == [160] * 3


@pytest.mark.parametrize("scorer", EXPERT_SCORERS)
@pytest.mark.parametrize("name", MIXTURES)
def test_keeping_all_changes_nothing(name: str, scorer: str, tokenizer: PreTrainedTokenizerFast) -> None:
    decoder = mixture(name, tokenizer)
    before = {key: value.clone() for key, value in decoder.model.state_dict().items()}
    scores = EXPERT_SCORERS[scorer](context_of(decoder))
    for layer, kept in zip(decoder.layers, best(scores, [6, 6, 6], decoder.layers), strict=True):
        experts.cut(layer, kept)
    experts.tell_config(decoder)
    after = decoder.model.state_dict()
    assert after.keys() == before.keys() and all(torch.equal(after[key], before[key]) for key in before)
    assert all(layer.mixture is not None and layer.mixture.watch is None for layer in decoder.layers)


@pytest.mark.parametrize("name", MIXTURES)
def test_scores_are_those_of_a_loop_over_tokens(name: str, tokenizer: PreTrainedTokenizerFast) -> None:
    """Against the stock module's own arithmetic, token by token."""
    family, changes = MIXTURES[name]
    stock = make_model(family, **changes)
    seen: list[tuple[Tensor, Tensor, Tensor]] = []
    hooks = [
        layer.mlp.experts.register_forward_pre_hook(lambda _, args: seen.append(args)) for layer in stock.model.layers
    ]
    stock(TOKENS)
    for hook in hooks:
        hook.remove()
    context = context_of(mixture(name, tokenizer))
    reap, frequency = (EXPERT_SCORERS[scorer](context) for scorer in ("reap", "frequency"))
    for index, (hidden, sent, weights) in enumerate(seen):
        module = stock.model.layers[index].mlp.experts
        norms: list[list[float]] = [[] for _ in range(6)]
        for token, row in enumerate(sent.tolist()):
            for place, expert in enumerate(row):
                gate, up = (module.gate_up_proj[expert] @ hidden[token]).chunk(2)
                output = module.down_proj[expert] @ (nn.functional.silu(gate) * up)
                norms[expert].append(float(weights[token, place]) * float(output.norm()))
        for expert, own in enumerate(norms):
            assert float(reap[index][expert]) == pytest.approx(sum(own) / max(len(own), 1), rel=1e-4)
            assert float(frequency[index][expert]) == pytest.approx(len(own) / TOKENS.numel())


def test_an_expert_without_tokens_scores_nothing(tokenizer: PreTrainedTokenizerFast) -> None:
    decoder = mixture("mixtral", tokenizer)
    with shielded(decoder.layers[1].module.mlp, [0, 1, 2, 4, 5]):
        context = context_of(decoder)
        assert EXPERT_SCORERS["reap"](context)[1][3] == 0 == EXPERT_SCORERS["frequency"](context)[1][3]


def test_random_scores_depend_on_the_seed(tokenizer: PreTrainedTokenizerFast) -> None:
    decoder = mixture("mixtral", tokenizer)
    first, again, other = (torch.cat(EXPERT_SCORERS["random"](context_of(decoder, seed=seed))) for seed in (1, 1, 2))
    assert torch.equal(first, again) and not torch.equal(first, other)


def test_of_a_trained_mixture_the_lowest_is_missed_least(tokenizer: PreTrainedTokenizerFast) -> None:
    """Each expert is dropped alone and the loss is measured: what REAP gives first costs less than what it gives last."""
    model = train(
        make_model("mixtral", num_local_experts=4, hidden_size=24, intermediate_size=32), tokenizer, steps=120
    )
    ids = torch.tensor(tokenizer("\n\n".join(english("evaluation"))).input_ids)
    tokens = ids[: 24 * 64].view(24, 64)
    scores = EXPERT_SCORERS["reap"](context_of(decoder_of(copy.deepcopy(model), tokenizer), tokens))

    def loss_without(gone: list[int]) -> float:
        decoder = decoder_of(copy.deepcopy(model), tokenizer)
        for layer, expert in zip(decoder.layers, gone, strict=True):
            experts.cut(layer, [other for other in range(4) if other != expert])
        return float(next(decoder.batch_losses(tokens, len(tokens))).mean())

    lowest, highest = ([int(pick(own)) for own in scores] for pick in (torch.argmin, torch.argmax))
    assert loss_without(lowest) < loss_without(highest)


@pytest.mark.parametrize("name", MIXTURES)
def test_experts_and_then_their_channels(name: str, tokenizer: PreTrainedTokenizerFast) -> None:
    """Cut in either order, the model is the same, and channels of removed experts need no place in a plan."""
    one, other = mixture(name, tokenizer), mixture(name, tokenizer)
    kept, own = (0, 2, 3, 5), [expert * 160 + channel for expert in range(6) for channel in range(expert, 96 + expert)]
    for layer in one.layers:
        experts.cut(layer, kept)
        WIDTHS["channels"].cut(layer, [place * 160 + c for place, e in enumerate(kept) for c in range(e, 96 + e)])
    for layer in other.layers:
        WIDTHS["channels"].cut(layer, own)
        experts.cut(layer, kept)
    first, second = one.model.state_dict(), other.model.state_dict()
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert one.model.model.layers[0].mlp.experts.state_dict()["down_proj"].shape == (4, 48, 96)
    held = experts.WholeExperts().held(mixture(name, tokenizer).layers[0], kept)
    assert held == {"channels": tuple(index for index in range(960) if index // 160 in kept)}
    assert torch.equal(one.model(TOKENS).logits, other.model(TOKENS).logits)


@pytest.mark.parametrize("left", slow_but([1], [4, 1]))
@pytest.mark.parametrize("dtype", slow_but(["float32"], ["float32", "bfloat16"]))
@pytest.mark.parametrize("name", MIXTURES)
def test_what_is_saved_is_the_stock_class(
    name: str, dtype: str, left: int, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    """Loaded in a new process by transformers alone; there it computes the same logits and generates."""
    family, changes = MIXTURES[name]
    made = save(make_model(family, **changes).to(getattr(torch, dtype)), tokenizer, tmp_path / "source")
    source = locate(str(made), allow_paths=True)
    decoder = load(source, "auto")
    scores = EXPERT_SCORERS["reap"](context_of(decoder))
    for layer, kept in zip(decoder.layers, best(scores, [left] * 3, decoder.layers), strict=True):
        experts.cut(layer, kept)
        WIDTHS["channels"].cut(layer, [expert * 160 + channel for expert in range(left) for channel in range(96)])
    experts.tell_config(decoder)
    folder = tmp_path / "out"
    folder.mkdir()
    write_model(decoder, source, folder, stock=True)
    config = json.loads((folder / "config.json").read_text()) | experts.config_keys(decoder.layers[0])
    (folder / "config.json").write_text(json.dumps(config))
    assert {config[key] for key in decoder.shape.family.experts} == {left}
    assert config["num_experts_per_tok"] == min(left, decoder.shape.experts_per_token)
    check_checkpoint(decoder, folder, own_code=False)
    loaded = AutoModelForCausalLM.from_pretrained(folder)
    assert sum(parameter.numel() for parameter in loaded.parameters()) == decoder.parameters
    one, other = (model(TOKENS, output_router_logits=True).aux_loss for model in (loaded, decoder.model))
    assert torch.allclose(one, other, rtol=2e-2)


BLOCKS: dict[str, dict[str, Any]] = {
    "deepseek_v3": {"n_routed_experts": 8, "n_group": 2, "topk_group": 1, "num_experts_per_tok": 2},
    "dots1": {"n_routed_experts": 8, "n_group": 1, "topk_group": 1, "n_shared_experts": 1},
    "ernie4_5_moe": {"moe_num_experts": 8, "moe_k": 3, "moe_num_shared_experts": 1},
    "glm4_moe": {"n_routed_experts": 8, "n_group": 1, "topk_group": 1},
    "granitemoe": {"num_local_experts": 8},
    "jamba": {"num_experts": 8},
    "lfm2_moe": {"num_experts": 8, "use_expert_bias": True},
    "minimax": {"num_local_experts": 8},
    "minimax_m2": {"num_local_experts": 8},
    "olmoe": {"num_experts": 8},
    "qwen2_moe": {"num_experts": 8, "shared_expert_intermediate_size": 32},
    "qwen3_next": {"num_experts": 8, "shared_expert_intermediate_size": 32},
}
"""Model types whose blocks of experts have other routers, with the settings that make such a block small."""


def block_of(model_type: str, **changes: int) -> nn.Module:
    """Return a random block of experts of a stock class."""
    sizes = {"hidden_size": 48, "intermediate_size": 32, "moe_intermediate_size": 32, "num_experts_per_tok": 3}
    config = AutoConfig.for_model(model_type, **{**sizes, **BLOCKS[model_type], **changes})
    module = __import__(MODEL_FOR_CAUSAL_LM_MAPPING[type(config)].__module__, fromlist=["x"])
    names = ("MoE", "Moe", "SparseMoeBlock")
    made = next(c for n, c in vars(module).items() if n.endswith(names) and issubclass(c, nn.Module))
    torch.manual_seed(0)
    block: nn.Module = made(config).eval().requires_grad_(False)
    for _, tensor in (*block.named_parameters(), *block.named_buffers()):
        tensor.copy_(torch.randn_like(tensor) * 0.3)
    return block


def layer_of(block: nn.Module) -> Layer:
    module = nn.Module()
    module.mlp = block
    shape = LayerShape(3, 6, 8, 32, 8)
    layer = Layer(module, MIXTRAL, shape, LayerCost(1, 1))
    layer.take_apart(shape, 48)
    return layer


@pytest.mark.parametrize("kept", [(0, 1, 2, 5, 6, 7), pytest.param((0, 3, 4, 6), marks=pytest.mark.slow)], ids=str)
@pytest.mark.parametrize("model_type", BLOCKS)
def test_routers_of_other_classes(model_type: str, kept: tuple[int, ...]) -> None:
    """Biases and buffers go with the experts, and shared experts stay."""
    block = block_of(model_type)
    hidden = torch.randn(2, 20, 48, generator=torch.Generator().manual_seed(1))

    def given() -> Tensor:
        output = block(hidden)
        return output[0] if isinstance(output, tuple) else output

    whole = given()
    layer = layer_of(block)
    with shielded(block, kept):
        expected = given()
    experts.cut(layer, kept)
    found = given()
    assert torch.isfinite(expected).all() and not torch.allclose(expected, whole, atol=1e-3)
    assert torch.allclose(found, expected, atol=1e-5 * float(expected.abs().max()))


def test_groups_keep_as_many_each() -> None:
    layer = layer_of(block_of("deepseek_v3", num_experts_per_tok=3))
    assert experts.groups(layer) == 2 and experts.experts_per_token(layer) == 3
    scores = torch.tensor([8.0, 7, 6, 5, 4, 3, 2, 1], dtype=torch.float64)
    assert best([scores], [4], [layer]) == [(0, 1, 4, 5)]
    with pytest.raises(ValueError, match="as many in each group"):
        experts.cut(layer, (0, 1, 2, 4))
    experts.cut(layer, (0, 1, 4, 5))
    assert experts.experts_per_token(layer) == 2, "a token is sent to the experts of one group"


@pytest.mark.parametrize("kept", [(), (1, 1)])
def test_one_expert_stays(kept: tuple[int, ...], tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(ValueError, match="one at least must stay"):
        experts.cut(mixture("mixtral", tokenizer).layers[0], kept)


def test_a_router_that_is_not_found_is_named() -> None:
    block = block_of("olmoe")
    block.chooser = block.gate
    del block.gate
    with pytest.raises(PruningError, match="OlmoeSparseMoeBlock cannot be removed") as caught:
        experts.cut(layer_of(block), (0, 1))
    assert caught.value.code == "unsupported_architecture"


def test_a_layer_without_experts_has_none(tokenizer: PreTrainedTokenizerFast) -> None:
    decoder = decoder_of(make_model("llama"), tokenizer)
    scores = EXPERT_SCORERS["reap"](context_of(decoder))
    assert [len(own) for own in scores] == [0, 0, 0] == [experts.units(layer) for layer in decoder.layers]
    assert best(scores, [0, 0, 0], decoder.layers) == [(), (), ()]
    assert experts.config_keys(decoder.layers[0]) == {}
    experts.cut(decoder.layers[0], ())
    experts.tell_config(decoder)
