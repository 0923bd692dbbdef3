"""llm-pruner, movement and loraprune against whole-model autograd, finite differences and loops written out."""

import copy
from collections.abc import Callable, Iterator

import pytest
import torch
from scipy.stats import spearmanr
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from secateur.catalog.spec import PruningSpec
from secateur.contract.errors import PruningError
from secateur.engine.model.cutting import apply_plan
from secateur.engine.model.decoder import token_losses
from secateur.engine.model.plan import Plan
from secateur.engine.scoring import Context, Scores, llm_pruner, loraprune, movement
from secateur.engine.scoring.taylor import training_batches
from tests.engine.models import FAMILIES, VOCABULARY, decoder_of, english, layer_plan, make_model
from tests.engine.running import resolved
from tests.tiers import slow_but

SCORERS = {"llm-pruner": llm_pruner.score, "movement": movement.score, "loraprune": loraprune.score}
ATTENTION = [f"self_attn.{name}_proj" for name in "qkvo"]
CHANNEL = [f"mlp.{name}_proj" for name in ("gate", "up", "down")]

Salience = dict[str, Tensor]
"""Of one layer, by parameter name; what is summed over units."""


def context_of(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, tokens: Tensor, batch_windows: int = 64, seed: int = 0
) -> Context:
    spec, decoder = PruningSpec(target_ratio=0.2, method="llm-pruner"), decoder_of(model, tokenizer)
    return Context(decoder, tokens, batch_windows, resolved(spec, decoder.shape), 0.2, seed, lambda share: None)


@pytest.fixture(scope="module")
def tokens() -> Tensor:
    return torch.randint(VOCABULARY, (3, 12), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def text(tokenizer: PreTrainedTokenizerFast) -> Tensor:
    ids = tokenizer("\n".join(english("evaluation"))).input_ids[: 16 * 64]
    return torch.tensor(ids).view(16, 64)


def unit_of(model: PreTrainedModel, name: str, kind: str, tensor: Tensor) -> list[Tensor]:
    """The pieces of one parameter by the unit they go with, cut by hand from what the config says of heads."""
    if name.endswith(("o_proj", "down_proj")):
        if kind == "bias":
            return []
        tensor = tensor.T
    if name in CHANNEL:
        return list(tensor)
    head_dim = getattr(model.config, "head_dim", None) or model.config.hidden_size // model.config.num_attention_heads
    heads_per_group = model.config.num_attention_heads // model.config.num_key_value_heads
    return list(tensor.split(head_dim * (heads_per_group if name[-6] in "qo" else 1)))


def sums(model: PreTrainedModel, names: list[str], salience: Salience, normalised: bool = False) -> Tensor:
    total = torch.zeros(())
    for name in names:
        own = [
            torch.stack([piece.double().sum() for piece in pieces])
            for kind in ("weight", "bias")
            if f"{name}.{kind}" in salience and (pieces := unit_of(model, name, kind, salience[f"{name}.{kind}"]))
        ]
        units = torch.stack(own).sum(0)
        total = total + (units / (units.square().sum().sqrt() + 1e-8) if normalised else units)
    return total


def projections(module: nn.Module) -> dict[str, nn.Parameter]:
    return {name: value for name, value in module.named_parameters() if name.rpartition(".")[0] in ATTENTION + CHANNEL}


def loss(model: PreTrainedModel, tokens: Tensor) -> Tensor:
    return token_losses(model(tokens, use_cache=False).logits, tokens).mean()


def differentiated(model: PreTrainedModel, tokens: Tensor) -> tuple[list[Salience], list[Salience], float]:
    """The projections' parameters and their gradients, by layer, and the loss: the whole model's plain autograd."""
    layers = [projections(module) for module in model.model.layers]
    value = loss(model, tokens)
    found = iter(torch.autograd.grad(value, [weight for layer in layers for weight in layer.values()]))
    gradients = [{name: next(found) for name in layer} for layer in layers]
    return (
        [{name: weight.detach() for name, weight in layer.items()} for layer in layers],
        gradients,
        float(value.detach()),
    )


def assert_close(found: Scores, expected: list[tuple[Tensor, Tensor]], tolerance: float) -> None:
    for heads, channels, (wanted_heads, wanted_channels) in zip(
        found["kv_groups"], found["channels"], expected, strict=True
    ):
        for one, other in ((heads, wanted_heads), (channels, wanted_channels)):
            assert one.dtype == torch.float64 and one.device.type == "cpu" and one.shape == other.shape
            assert float((one - other).norm() / other.norm()) < tolerance


@pytest.mark.parametrize(
    "family",
    [
        name
        for name in FAMILIES
        if name.startswith(("llama", "mistral", "qwen2", "qwen3", "gemma")) and "moe" not in name
    ],
)
@pytest.mark.parametrize("cut", [False, True])
def test_llm_pruner_is_whole_model_autograd(
    family: str, cut: bool, tokenizer: PreTrainedTokenizerFast, tokens: Tensor
) -> None:
    model = make_model(family).double()
    if cut:  # widths that differ from layer to layer
        groups = tuple(range(model.config.num_key_value_heads))
        kept = [layer_plan(groups, tuple(range(160))), layer_plan(groups[1:], tuple(range(64)))]
        apply_plan(decoder_of(model, tokenizer), Plan((*kept, kept[0])))
    expected = []
    weights, gradients, _ = differentiated(copy.deepcopy(model).requires_grad_(True), tokens)
    for layer, of in zip(weights, gradients, strict=True):
        salience = {name: (weight * of[name]).abs() for name, weight in layer.items()}
        expected.append((sums(model, ATTENTION, salience), sums(model, CHANNEL, salience)))
    found = llm_pruner.score(context_of(model, tokenizer, tokens, batch_windows=2))
    assert_close(found, expected, 1e-5)  # norms compute in float32 whatever the model


def test_llm_pruner_sums_first_order_loss_changes(tokenizer: PreTrainedTokenizerFast, tokens: Tensor) -> None:
    """Each weight of one channel nudged by a share of itself, up and down."""
    model, channel, share = make_model("llama-biased").double(), 17, 0.02
    found = llm_pruner.score(context_of(model, tokenizer, tokens))["channels"][1][channel]
    total = 0.0
    with torch.no_grad():
        for name, value in projections(model.model.layers[1]).items():
            if name.rpartition(".")[0] not in CHANNEL or name == "mlp.down_proj.bias":
                continue
            weights = (value.T if "down" in name else value)[channel].view(-1)  # a view: nudges the model itself
            for position, weight in enumerate(weights.tolist()):
                losses = []
                for sign in (1, -1):
                    weights[position] = weight * (1 + sign * share)
                    losses.append(float(loss(model, tokens)))
                weights[position] = weight
                total += abs(losses[0] - losses[1]) / (2 * share)
    assert abs(float(found) - total) < 0.01 * total


@pytest.mark.parametrize("family", ["llama", "llama-biased", "qwen2", "qwen3"])
def test_movement_is_a_loop_of_sgd(
    family: str,
    tokenizer: PreTrainedTokenizerFast,
    tokens: Tensor,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(movement, "STEPS", 4)
    monkeypatch.setattr(movement, "LEARNING_RATE", 2e-3)  # random models are steep
    model = make_model(family).double()
    moving = copy.deepcopy(model).requires_grad_(True)
    expected = [(torch.zeros(()), torch.zeros(()))] * 3
    values = []
    for _ in range(4):  # all windows are one batch: their order is of no account
        weights, gradients, value = differentiated(moving, tokens)
        values.append(value)
        for index, (layer, of) in enumerate(zip(weights, gradients, strict=True)):
            salience = {name: weight * of[name] for name, weight in layer.items()}
            heads, channels = expected[index]
            expected[index] = heads - sums(model, ATTENTION, salience), channels - sums(model, CHANNEL, salience)
            for name, weight in layer.items():
                if name not in ("self_attn.o_proj.bias", "mlp.down_proj.bias"):  # they go with no unit
                    weight -= 2e-3 * of[name]  # shares the model's memory
    assert values[-1] < values[0]
    assert_close(movement.score(context_of(model, tokenizer, tokens)), expected, 1e-4)


def test_movement_keeps_what_training_moves_from_zero(tokenizer: PreTrainedTokenizerFast, text: Tensor) -> None:
    """The score is −⟨w, g⟩ summed: half the growth of a unit's squared norm over the learning rate, for small steps."""
    model = make_model("llama").double()
    context = context_of(model, tokenizer, text[:2, :16])
    moving = copy.deepcopy(model).requires_grad_(True)
    columns = [module.mlp.down_proj.weight for module in moving.model.layers]
    rows = [
        weight for module in moving.model.layers for weight in (module.mlp.gate_proj.weight, module.mlp.up_proj.weight)
    ]
    optimizer = torch.optim.SGD([*columns, *rows], lr=1e-6)

    def squared(index: int) -> Tensor:
        gate, up = rows[2 * index : 2 * index + 2]
        return (columns[index].square().sum(0) + (gate.square() + up.square()).sum(1)).detach().clone()

    before = [squared(index) for index in range(3)]
    for _ in range(movement.STEPS):
        optimizer.zero_grad()
        loss(moving, context.tokens).backward()
        optimizer.step()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(movement, "LEARNING_RATE", 1e-6)
        found = movement.score(context)["channels"]
    for index, channels in enumerate(found):
        assert spearmanr(channels, (squared(index) - before[index]) / 2e-6).statistic > 0.99


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_loraprune_is_chain_rule_on_explicit_matrices(
    family: str, tokenizer: PreTrainedTokenizerFast, tokens: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weights W + 2·B·A put into a copy; ∂L/∂B = 2·G·Aᵀ and ∂L/∂A = 2·Bᵀ·G from its full gradient G; AdamW by hand."""
    monkeypatch.setattr(loraprune, "STEPS", 5)
    monkeypatch.setattr(loraprune, "LEARNING_RATE", 3e-2)  # B must grow enough for its terms to be seen
    model = make_model(family).double()
    merged = copy.deepcopy(model).requires_grad_(True)
    layers = [
        {name: module.get_submodule(name).weight.detach() for name in ATTENTION + CHANNEL}
        for module in merged.model.layers
    ]
    sources = [{name: weight.clone() for name, weight in layer.items()} for layer in layers]
    generator = torch.Generator().manual_seed(7)
    factors: dict[tuple[int, str], list[Tensor]] = {}
    for index, layer in enumerate(layers):
        for name, weight in layer.items():
            down = torch.rand(8, weight.shape[1], generator=generator, dtype=torch.float64) * 2 - 1
            factors[index, name] = [down / weight.shape[1] ** 0.5, torch.zeros(len(weight), 8, dtype=torch.float64)]
    moments = {
        key: [(torch.zeros_like(factor), torch.zeros_like(factor)) for factor in of] for key, of in factors.items()
    }
    expected = [(torch.zeros(()), torch.zeros(()))] * len(layers)
    for step in range(1, 6):
        for (index, name), (down, up) in factors.items():
            layers[index][name].copy_(sources[index][name] + 2 * up @ down)
        _, full, _ = differentiated(merged, tokens)
        gradients = {}
        for (index, name), (down, up) in factors.items():
            of = full[index][f"{name}.weight"]
            gradients[index, name] = [2 * up.T @ of, 2 * of @ down.T]
        norm = torch.stack([gradient.square().sum() for of in gradients.values() for gradient in of]).sum().sqrt()
        assert norm > 1  # so that clipping is put to the test
        for key, pair in gradients.items():
            gradients[key] = [gradient / (norm + 1e-6) for gradient in pair]
        for index, layer in enumerate(layers):
            salience = {}
            for name, weight in layer.items():
                (down, up), (down_gradient, up_gradient) = factors[index, name], gradients[index, name]
                estimate = up @ down - (up - up_gradient) @ (down - down_gradient)  # what one unit step would take away
                salience[f"{name}.weight"] = (estimate * weight).abs()
            heads, channels = expected[index]
            expected[index] = (
                0.9 * heads + 0.1 * sums(model, ATTENTION, salience, True),
                0.9 * channels + 0.1 * sums(model, CHANNEL, salience, True),
            )
        for key, pair in factors.items():
            for factor, gradient, (first, second) in zip(pair, gradients[key], moments[key], strict=True):
                first.mul_(0.9).add_(0.1 * gradient)
                second.mul_(0.999).add_(0.001 * gradient.square())
                mean, spread = first / (1 - 0.9**step), second / (1 - 0.999**step)
                factor -= 3e-2 * mean / (spread.sqrt() + 1e-8)
    assert_close(loraprune.score(context_of(model, tokenizer, tokens, seed=7)), expected, 1e-3)


@pytest.mark.parametrize("scorer", SCORERS.values(), ids=SCORERS)
def test_the_model_is_left_as_it_was(
    scorer: Callable[[Context], Scores], tokenizer: PreTrainedTokenizerFast, tokens: Tensor
) -> None:
    model = make_model("llama-biased").bfloat16()
    before = copy.deepcopy(model.state_dict())
    with torch.no_grad():
        logits = model(tokens).logits
    scorer(context_of(model, tokenizer, tokens))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not any(value.requires_grad or value.grad is not None for value in model.parameters())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    with torch.no_grad():
        assert torch.equal(model(tokens).logits, logits)


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.parametrize("scorer", slow_but([llm_pruner.score], SCORERS.values()), ids=SCORERS)
def test_threads_do_not_change_the_order(
    scorer: Callable[[Context], Scores],
    trained: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    text: Tensor,
    threads: Callable[[int], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for module in (movement, loraprune):
        monkeypatch.setattr(module, "STEPS", 3)
    found = []
    for count in (1, 2):
        threads(count)
        found.append(scorer(context_of(trained, tokenizer, text[:4, :32], batch_windows=2, seed=3)))
    for one, other in zip(*(each["kv_groups"] + each["channels"] for each in found), strict=True):
        assert torch.allclose(one, other, rtol=1e-3, atol=1e-3 * float(one.abs().max()))
        assert torch.equal(one.argsort(), other.argsort())


@pytest.mark.parametrize("dtype", slow_but([torch.bfloat16], [torch.float16, torch.bfloat16]))
@pytest.mark.parametrize("scorer", SCORERS.values(), ids=SCORERS)
def test_half_precision_ranks_like_single(
    scorer: Callable[[Context], Scores],
    dtype: torch.dtype,
    trained: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    text: Tensor,
) -> None:
    single = scorer(context_of(trained, tokenizer, text, batch_windows=8))
    half = scorer(context_of(copy.deepcopy(trained).to(dtype), tokenizer, text, batch_windows=8))
    for one, other in zip(single["channels"], half["channels"], strict=True):
        assert other.dtype == torch.float64
        assert spearmanr(one, other).statistic > 0.97


@pytest.mark.parametrize("scorer", SCORERS.values(), ids=SCORERS)
def test_gradients_that_overflow_are_told(
    scorer: Callable[[Context], Scores], tokenizer: PreTrainedTokenizerFast, tokens: Tensor
) -> None:
    model = make_model("llama").half()
    model.model.layers[1].mlp.up_proj.weight.fill_(6e4)
    with pytest.raises(PruningError) as raised:
        scorer(context_of(model, tokenizer, tokens))
    assert raised.value.code == "loss_not_finite"


def test_every_pass_of_training_takes_every_window_once(tokenizer: PreTrainedTokenizerFast, tokens: Tensor) -> None:
    context = context_of(make_model("llama"), tokenizer, torch.arange(5)[:, None].expand(5, 12), batch_windows=2)

    def drawn(seed: int) -> list[int]:
        batches = training_batches(context, 6, torch.Generator().manual_seed(seed))
        return [int(window) for batch in batches for window in batch[:, 0]]

    order = drawn(0)
    assert sorted(order[:5]) == sorted(order[5:]) == [0, 1, 2, 3, 4]
    assert order == drawn(0) and order != drawn(1) and order[:5] != order[5:]
