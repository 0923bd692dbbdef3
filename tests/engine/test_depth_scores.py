"""Scores of blocks and sub-layers against dropping and measuring; compensation against the map that it folds."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from secateur.catalog.structures import DEPTH
from secateur.contract.errors import PruningError
from secateur.engine.measure.forward_statistics import ForwardStatistics, forward_statistics
from secateur.engine.model.decoder import Decoder
from secateur.engine.recovery.depth import LastProjection, absent, compensate
from secateur.engine.scoring.depth import Removal, Unit, by_structure, can_leave, greedy, influences
from secateur.engine.structures import layers
from tests.engine.models import FAMILIES, LIKE_LLAMA, VOCABULARY, decoder_of, english, make_model
from tests.engine.test_depth import leave, loaded
from tests.tiers import slow_but

TOKENS = torch.randint(VOCABULARY, (8, 16), generator=torch.Generator().manual_seed(3))
UNITS: list[Unit] = [(structure, index) for structure in DEPTH for index in range(3)]
ADDITIVE = [name for name in FAMILIES if name not in ("gemma2", "gemma3", "glm4", "chatglm6b")]


def ignore(share: float) -> None:
    pass


def any_number(gone: Any, unit: Unit) -> bool:
    return True


def loss(decoder: Decoder, tokens: Tensor) -> float:
    with torch.no_grad():
        return float(next(decoder.batch_losses(tokens, len(tokens))).double().mean())


def dropped(decoder: Decoder, units: list[Unit]) -> Decoder:
    """A copy without the units."""
    less = copy.deepcopy(decoder)
    for structure, index in units:
        if structure != "layers":
            leave(less, (structure, index))
    gone = by_structure(units).get("layers", set())
    layers.cut(less, [index for index in range(len(less.layers)) if index not in gone])
    return less


@pytest.mark.parametrize("name", slow_but(["llama"], ["llama", "gpt-neox", "opt", "mixtral", "gemma2"]))
def test_greedy_is_dropping_and_measuring(name: str, tokenizer: PreTrainedTokenizerFast) -> None:
    decoder = decoder_of(make_model(name), tokenizer)
    base = loss(decoder, TOKENS)
    gone: list[Unit] = []
    prices = {unit: 2 if unit[0] == "layers" else 1 for unit in UNITS}
    for removal in greedy(decoder, TOKENS, 3, prices, False, any_number, ignore):
        before = loss(dropped(decoder, gone), TOKENS)
        candidates = [unit for unit in UNITS if can_leave(decoder, gone, unit)]
        losses = {unit: loss(dropped(decoder, [*gone, unit]), TOKENS) for unit in candidates}
        unit = min(candidates, key=lambda unit: (losses[unit] - before) / prices[unit])
        assert (removal.structure, removal.index) == unit
        assert abs(removal.loss - (losses[unit] - base)) < 1e-5
        gone.append(unit)
    assert len(gone) >= 2


def test_influence_of_a_block_is_the_papers(tokenizer: PreTrainedTokenizerFast) -> None:
    decoder = decoder_of(make_model("qwen3"), tokenizer)
    found = influences(decoder, TOKENS, 3, UNITS, ignore)
    statistics = ForwardStatistics.of(forward_statistics(decoder, TOKENS, 3, ignore))
    for index, cosine in enumerate(statistics.cosines):
        assert abs(found["layers", index] - (1 - cosine)) < 1e-6
    captured = decoder.capture(TOKENS)
    entering, output = captured.inputs[1], decoder.run_layer(captured, 1, captured.inputs[1])
    o_proj = decoder.layers[1].attention_output.weight
    o_proj.data.zero_()
    less = decoder.run_layer(captured, 1, entering)
    expected = 1 - float(torch.nn.functional.cosine_similarity(output, less, dim=-1).mean())
    assert abs(found["attention", 1] - expected) < 1e-6


@pytest.mark.parametrize("structures", [("layers",), ("attention", "feed_forward")])
def test_compensated_loss_is_that_of_folded_weights(
    structures: tuple[str, ...], trained: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast
) -> None:
    decoder = decoder_of(trained, tokenizer)
    before = {name: tensor.clone() for name, tensor in trained.state_dict().items()}
    tokens = texts(tokenizer, "calibration", 16)
    prices = {unit: 1 for unit in UNITS if unit[0] in structures and unit[1] > 0}
    steps = greedy(decoder, tokens, 4, prices, True, any_number, ignore)
    first = next(steps)
    folded = dropped(decoder, [(first.structure, first.index)])
    measured = tokens[::4]
    steps.close()
    assert abs(first.loss - (loss(folded, measured) - loss(decoder, measured))) < 1e-4
    assert all(torch.equal(tensor, before[name]) for name, tensor in trained.state_dict().items())


@pytest.mark.parametrize("name", slow_but(["llama", "gpt2", "mixtral"], [*ADDITIVE, *LIKE_LLAMA]))
@pytest.mark.parametrize("without", [None, "feed_forward"])
def test_folded_weights_are_the_map(
    name: str, without: Any, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    decoder, _ = loaded(make_model(name), tokenizer, tmp_path)
    entered = decoder.enter(TOKENS)
    hidden = entered.hidden
    with torch.no_grad(), absent(decoder.layers[0], 0, {} if without is None else {without: {0}}):
        last = LastProjection(decoder, 0, entered, hidden)
        run = last.run(entered, hidden)
        change = 0.05 * torch.randn(run.features.shape[1], 48, generator=torch.Generator().manual_seed(1))
        expected = run.output + (run.features @ change).view_as(run.output)
        last.fold(change)
        output = decoder.run_layer(entered, 0, hidden)
    assert torch.allclose(output, expected, atol=1e-4 * float(expected.abs().max()))
    assert not torch.allclose(output, run.output, atol=1e-2)


def texts(tokenizer: PreTrainedTokenizerFast, part: str, windows: int) -> Tensor:
    ids = tokenizer("\n".join(english(part))).input_ids[: windows * 48]
    return torch.tensor(ids).view(windows, 48)


@pytest.mark.parametrize("dtype", slow_but([torch.float32], [torch.float32, torch.bfloat16]))
@pytest.mark.parametrize("unit", [("layers", 0), ("layers", 1), ("attention", 1), ("feed_forward", 1)])
def test_compensation_lowers_the_loss(
    unit: Unit, dtype: torch.dtype, trained: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast
) -> None:
    decoder = decoder_of(trained.to(dtype), tokenizer)
    plain = dropped(decoder, [unit])
    tokens = texts(tokenizer, "calibration", 64)
    compensate(decoder, tokens, 16, by_structure([unit]), ignore)
    compensated = dropped(decoder, [unit])
    assert loss(compensated, tokens) < loss(plain, tokens)
    assert {tensor.dtype for tensor in compensated.model.state_dict().values()} == {dtype}


def test_compensation_behind_a_norm_is_refused(tokenizer: PreTrainedTokenizerFast) -> None:
    decoder = decoder_of(make_model("gemma2"), tokenizer)
    with pytest.raises(PruningError, match="gemma"):
        compensate(decoder, TOKENS, 4, {"layers": {1}}, ignore)


def test_what_can_leave(tokenizer: PreTrainedTokenizerFast) -> None:
    decoder = decoder_of(make_model("llama"), tokenizer)
    assert can_leave(decoder, [("layers", 0)], ("layers", 1))
    assert not can_leave(decoder, [("layers", 0), ("layers", 1)], ("layers", 2))
    assert not can_leave(decoder, [("attention", 0), ("attention", 1)], ("attention", 2))
    assert not can_leave(decoder, [("attention", 0)], ("feed_forward", 0))
    assert not can_leave(decoder, [("attention", 0), ("attention", 1)], ("layers", 2))
    assert isinstance(next(greedy(decoder, TOKENS, 4, {("layers", 1): 1}, False, any_number, ignore)), Removal)
