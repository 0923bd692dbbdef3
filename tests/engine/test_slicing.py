"""Sliced against masked: cutting units out must do what shielding them does, on every family."""

from collections.abc import Iterable
from contextlib import ExitStack

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from secateur.catalog.architectures import ModelShape
from secateur.engine.model.cutting import apply_plan
from secateur.engine.model.plan import Plan
from secateur.engine.structures import WIDTHS, gated
from tests.engine.models import FAMILIES, VOCABULARY, decoder_of, layer_plan, make_model

TOKENS = torch.randint(VOCABULARY, (2, 40), generator=torch.Generator().manual_seed(3))


def some_plan(shape: ModelShape) -> Plan:
    """Different widths in every layer; layer 1 untouched."""
    groups = shape.layers[0].kv_groups
    return Plan(
        (
            layer_plan(tuple(range(1, groups)), of_each(shape, range(0, 160, 5))),
            layer_plan(tuple(range(groups)), of_each(shape, range(160))),
            layer_plan((groups - 1,), of_each(shape, range(64))),
        )
    )


def of_each(shape: ModelShape, channels: Iterable[int]) -> tuple[int, ...]:
    """As many channels of every expert, each expert's own; of a model without experts, these ``channels`` of 160."""
    return tuple(
        expert * 160 + channel
        for expert in range(shape.layers[0].experts)
        for channel in sorted((channel + expert) % 160 for channel in channels)
    )


@pytest.mark.parametrize("name", FAMILIES)
def test_sliced_equals_masked(name: str, tokenizer: PreTrainedTokenizerFast) -> None:
    decoder = decoder_of(make_model(name), tokenizer)
    plan = some_plan(decoder.shape)
    with ExitStack() as stack:
        for layer, kept in zip(decoder.layers, plan.layers, strict=True):
            gates = {name: torch.zeros(1, structure.units(layer)) for name, structure in WIDTHS.items()}
            for name, gate in gates.items():
                gate[0, list(kept[name])] = 1
            stack.enter_context(gated(layer, gates))
        masked = decoder.model(TOKENS).logits
    full = decoder.model(TOKENS).logits
    apply_plan(decoder, plan)
    sliced = decoder.model(TOKENS).logits
    assert torch.allclose(sliced, masked, atol=1e-4 * float(masked.abs().max()))
    assert not torch.allclose(sliced, full, atol=0.1)
    assert decoder.prunable_parameters == plan.parameters(decoder.shape)
    assert [layer.shape.channels_per_expert for layer in decoder.layers] == [32, 160, 64]


@pytest.mark.parametrize("name", FAMILIES)
def test_layer_by_layer_is_the_model(name: str, tokenizer: PreTrainedTokenizerFast) -> None:
    stock = make_model(name)
    expected = stock(TOKENS).logits
    decoder = decoder_of(stock, tokenizer)
    captured = decoder.capture(TOKENS)
    for start in range(3):
        assert torch.allclose(decoder.resume(captured, start, captured.inputs[start]), expected, atol=1e-4)
    entered = decoder.enter(TOKENS)
    assert torch.equal(entered.hidden, captured.inputs[0])


def test_keeping_everything_is_bit_identical(tokenizer: PreTrainedTokenizerFast) -> None:
    decoder = decoder_of(make_model("qwen2"), tokenizer)
    before = decoder.model(TOKENS).logits
    apply_plan(decoder, Plan.full(decoder.shape.layers))
    assert torch.equal(decoder.model(TOKENS).logits, before)


def test_cutting_twice_is_cutting_once(tokenizer: PreTrainedTokenizerFast) -> None:
    once, twice = (decoder_of(make_model("llama"), tokenizer) for _ in range(2))
    first = some_plan(once.shape)
    second = Plan(tuple(layer_plan((0,), tuple(range(0, len(layer["channels"]), 2))) for layer in first.layers))
    apply_plan(once, first.then(second))
    apply_plan(twice, first)
    apply_plan(twice, second)
    assert torch.equal(once.model(TOKENS).logits, twice.model(TOKENS).logits)
