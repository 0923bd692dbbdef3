"""Training against steps worked out by hand, against itself killed half-way, and against the text it should model."""

import copy
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Literal

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from secateur.catalog.spec import TrainingSettings
from secateur.contract.errors import PruningError
from secateur.engine.model.cutting import apply_plan
from secateur.engine.model.decoder import Decoder, token_losses
from secateur.engine.model.plan import Plan
from secateur.engine.recovery import training
from secateur.engine.recovery.training import Segment, train
from tests.engine.models import VOCABULARY, decoder_of, english, layer_plan, make_model
from tests.tiers import slow_but

Kind = Literal["lora", "distill"]
KINDS: tuple[Kind, ...] = ("lora", "distill")


def ignore(share: float) -> None:
    pass


def logits_of(model: PreTrainedModel) -> Callable[[Tensor], Tensor]:
    return lambda tokens: model(tokens).logits


def start(
    decoder: Decoder, kind: Kind, recovery: TrainingSettings, tokens: Tensor, teacher: PreTrainedModel, parts: int = 8
) -> Iterator[Segment]:
    return train(decoder, logits_of(teacher), tokens, parts, recovery, 3, ignore, None)


def text(tokenizer: PreTrainedTokenizerFast, part: str, windows: int) -> Tensor:
    return torch.tensor(tokenizer("\n\n".join(english(part))).input_ids[: windows * 48]).view(windows, 48)


def noise(windows: int, length: int = 12) -> Tensor:
    return torch.randint(VOCABULARY, (windows, length), generator=torch.Generator().manual_seed(1))


def cut(decoder: Decoder) -> Decoder:
    """Unequal widths by layer, and a bias where pruning may have put one."""
    widths = [(2, 96), (3, 128), (1, 64)]
    apply_plan(decoder, Plan(tuple(layer_plan(tuple(range(g)), tuple(range(c))) for g, c in widths)))
    output = decoder.layers[0].channel_output
    if output.bias is None:
        bias = torch.full((output.out_features,), 0.01, dtype=output.weight.dtype)
        output.bias = nn.Parameter(bias, requires_grad=False)
    return decoder


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def adam_first_step(gradient: Tensor, rate: float) -> Tensor:
    return -rate * gradient / (gradient.abs() + 1e-8)


@pytest.mark.parametrize("kind", KINDS)
def test_wins_back_held_out_loss(kind: Kind, trained: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> None:
    teacher = copy.deepcopy(trained)
    decoder = cut(decoder_of(trained, tokenizer))
    held_out = text(tokenizer, "evaluation", 16)

    def loss(model: PreTrainedModel) -> float:
        with torch.no_grad():
            return float(token_losses(model(held_out).logits, held_out).mean())

    whole, before = loss(teacher), loss(decoder.model)
    shares: list[float] = []
    recovery = TrainingSettings(kind=kind, epochs=2, learning_rate=2e-3, batch_size=8)
    tokens = text(tokenizer, "calibration", 100)
    segments = list(train(decoder, logits_of(teacher), tokens, 8, recovery, 0, shares.append, None))
    assert [segment.step for segment in segments] == [20, 25]  # 2 · 100 / 8 steps
    assert [len(segment.losses) for segment in segments] == [20, 25]
    assert shares == [step / 25 for step in range(1, 26)]
    assert sum(segments[-1].losses[-5:]) < sum(segments[-1].losses[:5])
    assert before - loss(decoder.model) > (before - whole) / 3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", slow_but(["llama-tied"], ["llama-tied", "llama-biased", "qwen3"]))
def test_leaves_a_plain_frozen_model(
    name: str, kind: Kind, dtype: torch.dtype, tokenizer: PreTrainedTokenizerFast
) -> None:
    decoder = cut(decoder_of(make_model(name).to(dtype), tokenizer))
    model, before = decoder.model, weights(decoder.model)
    modules = {name: type(module) for name, module in model.named_modules()}
    attributes = set(vars(model))
    recovery = TrainingSettings(kind=kind, epochs=2, batch_size=4, learning_rate=0.01)
    *_, last = start(decoder, kind, recovery, noise(8), make_model(name, seed=1).to(dtype))
    assert last.step == last.steps == 4
    assert {tensor.dtype for tensor in last.tensors.values()} == {torch.float32}

    after = model.state_dict()
    assert list(after) == list(before)
    assert {name: type(module) for name, module in model.named_modules()} == modules
    assert set(vars(model)) == attributes
    assert not model.training and not any(module.training for module in model.modules())
    assert not any(parameter.requires_grad or parameter.grad is not None for parameter in model.parameters())
    assert {tensor.dtype for tensor in after.values()} == {dtype}
    assert model.config.tie_word_embeddings == (model.lm_head.weight is model.model.embed_tokens.weight)
    changed = {name for name in after if not torch.equal(after[name], before[name])}
    projections = {
        f"model.layers.{index}.{projection}.weight"
        for index in range(3)
        for projection in decoder.shape.family.projections
    }
    assert changed == (projections if kind == "lora" else {name for name in after if name.startswith("model.layers.")})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_killed_and_resumed_reaches_the_same_bits(
    kind: Kind,
    dtype: torch.dtype,
    tokenizer: PreTrainedTokenizerFast,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    monkeypatch.setattr(training, "SEGMENT_STEPS", 3)
    recovery = TrainingSettings(
        kind=kind, epochs=2.5, batch_size=5, learning_rate=0.01
    )  # 8 steps, batches across the ends of passes
    teacher, tokens = make_model("qwen3", seed=1).to(dtype), noise(16)
    whole = cut(decoder_of(make_model("qwen3").to(dtype), tokenizer))
    segments = start(whole, kind, recovery, tokens, teacher)
    first = next(segments)
    later = list(segments)
    save_file(first.tensors, tmp_path / "segment.safetensors")  # which training has gone on from, and left alone
    assert [segment.step for segment in later] == [6, 8]

    resumed = cut(decoder_of(make_model("qwen3").to(dtype), tokenizer))
    torch.manual_seed(77)  # another process: other random numbers
    segment = Segment(first.step, first.steps, first.losses, load_file(tmp_path / "segment.safetensors"))
    rest = list(train(resumed, logits_of(teacher), tokens, 8, recovery, 3, ignore, segment))
    assert [segment.step for segment in rest] == [6, 8]
    assert rest[-1].losses == later[-1].losses
    assert all(torch.equal(tensor, first.tensors[name]) for name, tensor in segment.tensors.items())
    for name, tensor in weights(whole.model).items():
        assert torch.equal(tensor, resumed.model.state_dict()[name])

    done = cut(decoder_of(make_model("qwen3").to(dtype), tokenizer))
    assert list(train(done, logits_of(teacher), tokens, 8, recovery, 3, ignore, later[-1])) == []
    for name, tensor in weights(whole.model).items():
        assert torch.equal(tensor, done.model.state_dict()[name])


def test_a_step_of_lora_worked_out_by_hand(trained: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> None:
    """B is zero at first: a step makes it AdamW's for ∂L/∂B = 16/r · ∂L/∂W·Aᵀ, A stays, W gains 16/r · B·A."""
    decoder = cut(decoder_of(trained, tokenizer))
    reference, before = copy.deepcopy(decoder.model).requires_grad_(True), weights(decoder.model)
    tokens = text(tokenizer, "calibration", 8)
    recovery = TrainingSettings(
        kind="lora", epochs=0.01, batch_size=64, learning_rate=1e-3, rank=4
    )  # one step of all windows
    (segment,) = start(decoder, "lora", recovery, tokens, trained, parts=3)  # in parts of 3, 3 and 2
    loss = token_losses(reference(tokens).logits, tokens).mean()  # in one part
    loss.backward()
    assert segment.losses == pytest.approx([loss.item()], rel=1e-6)
    for name, parameter in reference.named_parameters():
        key = f"parameter.{name.removesuffix('.weight')}.lora_A.default.weight"
        if key not in segment.tensors:
            assert torch.equal(decoder.model.state_dict()[name], before[name])
            continue
        a = segment.tensors[key]
        assert parameter.grad is not None and a.shape[0] == 4
        b = adam_first_step(4 * parameter.grad @ a.T, 1e-3)
        assert torch.allclose(segment.tensors[key.replace("lora_A", "lora_B")], b, atol=2e-6)
        assert torch.allclose(decoder.model.state_dict()[name], before[name] + 4 * b @ a, atol=1e-5)


def test_a_step_of_distillation_worked_out_by_hand(
    trained: PreTrainedModel, tokenizer: PreTrainedTokenizerFast
) -> None:
    teacher = copy.deepcopy(trained)
    decoder = cut(decoder_of(trained, tokenizer))
    reference = copy.deepcopy(decoder.model).requires_grad_(True)
    tokens = text(tokenizer, "calibration", 8)
    recovery = TrainingSettings(kind="distill", epochs=0.01, batch_size=64, learning_rate=1e-3, temperature=2.0)
    (segment,) = start(decoder, "distill", recovery, tokens, teacher, parts=3)
    wanted, found = ((model(tokens).logits.double() / 2).softmax(-1) for model in (teacher, reference))
    loss = 4 * (wanted * (wanted / found).log()).sum(-1).mean()
    loss.backward()
    assert loss.item() > 0.1
    assert segment.losses == pytest.approx([loss.item()], rel=1e-5)
    for name, parameter in reference.named_parameters():
        assert parameter.grad is not None
        moved = decoder.model.state_dict()[name] - parameter.detach()
        if not name.startswith("model.layers."):
            assert torch.equal(moved, torch.zeros_like(moved))
            continue
        clear = parameter.grad.abs() > 1e-6  # below, AdamW's step is of the gradient's rounding
        assert clear.float().mean() > 0.95
        assert torch.allclose(moved[clear], adam_first_step(parameter.grad, 1e-3)[clear], atol=1e-5)


def test_distilling_an_identical_student_changes_next_to_nothing(
    trained: PreTrainedModel, tokenizer: PreTrainedTokenizerFast
) -> None:
    """AdamW divides by the gradient's size: rounding alone moves a weight by up to the rate, but no further."""
    before, recovery = weights(trained), TrainingSettings(kind="distill", epochs=1, batch_size=8, learning_rate=1e-4)
    decoder, tokens = decoder_of(trained, tokenizer), text(tokenizer, "calibration", 32)
    *_, last = start(decoder, "distill", recovery, tokens, copy.deepcopy(trained))
    assert len(last.losses) == 4 and abs(last.losses[0]) < 1e-7
    assert max(map(abs, last.losses)) < 1e-3  # cut, the same model begins at 0.3
    for name, tensor in trained.state_dict().items():
        assert torch.allclose(tensor, before[name], rtol=0, atol=4e-4)


def test_every_pass_takes_every_window_once() -> None:
    """14 windows, 4 a step: 7 steps are two passes, in different orders, and another seed's differ again."""
    taken = [torch.cat([training._order(14, 4, step, seed) for step in range(7)]).tolist() for seed in (0, 100)]
    for windows in taken:
        assert sorted(windows[:14]) == sorted(windows[14:]) == list(range(14))
        assert windows[:14] != windows[14:]
    assert taken[0] != taken[1]


def test_the_learning_rate_rises_and_falls() -> None:
    rates = [training._rate(step, 100) for step in range(100)]
    assert rates[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert all(0 < later < sooner for sooner, later in pairwise(rates[4:]))
    assert training._rate(0, 1) == 1


@pytest.mark.parametrize("kind", KINDS)
def test_a_loss_that_is_not_finite_is_reported(kind: Kind, tokenizer: PreTrainedTokenizerFast) -> None:
    decoder = decoder_of(make_model("llama").half(), tokenizer)
    recovery = TrainingSettings(kind=kind, epochs=8, learning_rate=1.0, batch_size=4)
    with pytest.raises(PruningError) as caught:
        list(start(decoder, kind, recovery, noise(4), make_model("llama", seed=1).half()))
    assert (caught.value.code, caught.value.field) == ("loss_not_finite", "recovery.training.learning_rate")
