"""Plan arithmetic against hand counts, budgets against their targets."""

import re
from dataclasses import replace
from typing import Literal

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import TypeAdapter
from transformers import PreTrainedTokenizerFast

from secateur.catalog.architectures import LayerCost, LayerShape, ModelShape, shape_from_config
from secateur.catalog.architectures.base import nearest_amount
from secateur.catalog.architectures.llama import LLAMA
from secateur.contract.errors import PruningError
from secateur.engine.allocation import Layers, Share, best, whole_units
from secateur.engine.allocation.base import fill
from secateur.engine.allocation.schedule import cumulative_ratios, round_goals
from secateur.engine.model.plan import Plan, PlanData
from secateur.engine.scoring import Scores
from tests.engine.models import FAMILIES, decoder_of, layer_plan, make_model


@pytest.mark.parametrize("name", FAMILIES)
def test_shape_counts_what_the_model_has(name: str, tokenizer: PreTrainedTokenizerFast) -> None:
    model = make_model(name)
    shape = shape_from_config(model.config.to_dict())
    assert shape.parameters == sum(parameter.numel() for parameter in model.parameters())
    blocks = re.compile(r"\.(layers|h)\.\d+\.(?!.*(norm|ln_|mlp\.gate\.))")  # neither norm nor router: projection
    assert shape.prunable_parameters == sum(p.numel() for n, p in model.named_parameters() if blocks.search(n))
    assert decoder_of(model, tokenizer).prunable_parameters == shape.prunable_parameters


def test_unit_costs_by_hand() -> None:
    shape = shape_from_config(make_model("llama").config.to_dict())
    # hidden 48, 6 heads of 8 in 3 groups: 2 heads' q rows and o columns, one k row block, one v row block
    assert set(shape.costs) == {LayerCost(kv_group=48 * (16 + 8 + 8 + 16), channel=3 * 48)}
    assert shape.layers[0] == LayerShape(kv_groups=3, heads=6, head_dim=8, channels_per_expert=160)


def test_plans_compose() -> None:
    first = Plan((layer_plan((0, 2), (1, 3, 5, 7)),))
    assert first.then(Plan((layer_plan((1,), (0, 3)),))) == Plan((layer_plan((2,), (1, 7)),))
    assert Plan.from_data(first.as_data()) == first
    written = Plan((layer_plan((0,), (0, 1, 2, 7, 9, 10)),), {"vocabulary": (0, 1)}).as_data().model_dump(mode="json")
    layer = {"kv_groups": [[0, 0]], "channels": [[0, 2], [7, 7], [9, 10]]}
    assert written == {"version": 2, "layers": [layer], "model": {"vocabulary": [[0, 1]]}}


def test_structures_that_a_plan_does_not_name_keep_all_units() -> None:
    first = Plan(({"channels": (1, 3)},), {"vocabulary": (4, 5, 6)})
    second = first.then(Plan((layer_plan((0,), (1,)),), {"vocabulary": (2,)}))
    assert second == Plan((layer_plan((0,), (3,)),), {"vocabulary": (6,)})
    shape = make_shape((3, 2, 8), 1, LayerCost(40, 10))
    assert [(each.kv_groups, each.heads, each.channels) for each in first.widths(shape)] == [(3, 6, 2)]
    assert first.parameters(shape) == 3 * 40 + 2 * 10


def test_plans_of_version_1_are_read() -> None:
    stored = [{"kv_groups": [0, 2], "channels": [[0, 2], [7, 7]]}, {"kv_groups": [1], "channels": [[4, 5]]}]
    plan = Plan.from_data(TypeAdapter(PlanData).validate_python(stored))
    assert plan == Plan((layer_plan((0, 2), (0, 1, 2, 7)), layer_plan((1,), (4, 5))))


def test_whole_units_by_hand() -> None:
    shape = make_shape((2, 1, 8), 2, LayerCost(kv_group=40, channel=10))  # 160 a layer
    layers = Layers(shape, shape.layers, 2)
    scores = {"kv_groups": [torch.tensor([1.0, 2.0]), torch.tensor([4.0, 3.0])], "channels": [torch.arange(8.0)] * 2}

    def counts(share: Share, groups: int, scores: Scores | None) -> list[tuple[int, int]]:
        found = whole_units(layers, share, groups * 40, scores)
        return [(each["kv_groups"], each["channels"]) for each in found]

    # layer 0 gives half: one group and 4 channels; layer 1 a quarter: half a group, rounded up, and no channel
    assert counts(Share([80, 40]), 2, scores) == [(1, 4), (1, 0)]
    assert counts(Share([80, 40]), 1, scores) == [(1, 4), (0, 4)]
    # both would give half a group: the one whose group scores least does; without scores, the larger fraction
    assert counts(Share([40, 50]), 1, scores) == [(1, 0), (0, 4)]
    assert counts(Share([40, 50]), 1, None) == [(0, 4), (1, 0)]
    # a share that names groups has its own; what one layer has no channels for, the next gives
    assert counts(Share([80, 40], {"kv_groups": [0, 1]}), 2, scores) == [(0, 6), (1, 2)]


def test_the_best_stay() -> None:
    assert best(torch.tensor([1.0, 3.0, 1.0, 0.5]), 2) == (1, 2), "of equals the first goes"
    assert best(torch.tensor([2.0, 1.0]), 0) == (0, 1)


def make_shape(widths: tuple[int, int, int], layers: int, cost: LayerCost) -> ModelShape:
    groups, per_group, intermediate = widths
    layer = LayerShape(groups, groups * per_group, 16, intermediate)
    costs = (cost,) * layers
    return ModelShape(
        LLAMA, "llama", 64, 100, True, 128, (layer,) * layers, costs, other_parameters=0, stock_layer=layer
    )


@st.composite
def problems(draw: st.DrawFn) -> tuple[ModelShape, int, float, int]:
    multiple = draw(st.sampled_from([1, 8, 32]))
    widths = (draw(st.integers(1, 8)), draw(st.integers(1, 4)), draw(st.integers(1, multiple * 12)))
    cost = LayerCost(draw(st.integers(1, 5000)), draw(st.integers(1, 300)))
    shape = make_shape(widths, draw(st.integers(1, 8)), cost)
    return shape, multiple, draw(st.floats(0.05, 0.9)), draw(st.integers(1, 9))


@settings(max_examples=400)
@given(problems(), st.integers(0, 100), st.sampled_from(["geometric", "cubic"]), st.booleans())
def test_what_the_door_lets_in_is_met_to_within_half_a_block(
    problem: tuple[ModelShape, int, float, int], seed: int, schedule: Literal["geometric", "cubic"], scored: bool
) -> None:
    """Over any number of rounds, with uneven budgets, random scores or none; and what is refused would have been missed."""
    shape, multiple, ratio, rounds = problem
    cost, wanted = shape.costs[0], ratio * shape.prunable_parameters
    try:
        shape.check_ratio(ratio, multiple)
        accepted = True
    except PruningError:
        accepted = False
    generator = torch.Generator().manual_seed(seed)
    layers = Layers(shape, list(shape.layers), multiple)
    for target in round_goals(shape, ratio, rounds, schedule, multiple):
        gone = {
            name: cost_of * sum(a - b for a, b in zip(units(shape.layers), units(layers.now), strict=True))
            for name, cost_of, units in (
                ("kv_groups", cost.kv_group, lambda of: [each.kv_groups for each in of]),
                ("channels", cost.channel, lambda of: [each.channels for each in of]),
            )
        }
        groups = target.parameters["kv_groups"] - gone["kv_groups"]
        total = groups + max(target.parameters["channels"] - gone["channels"], 0)
        limits = [limit.parameters for limit in layers.limits]
        budgets = fill((torch.rand(len(layers), generator=generator) + 0.05).tolist(), limits, total)
        assert sum(budgets) == pytest.approx(total) and all(
            b <= limit + 1e-6 for b, limit in zip(budgets, limits, strict=True)
        )
        scores = {"kv_groups": [torch.rand(s.kv_groups, generator=generator) for s in layers.now]} if scored else None
        counts = whole_units(layers, Share(budgets), groups, scores)
        left = []
        for was, lost in zip(layers.now, counts, strict=True):
            width = was.channels_per_expert - lost["channels"]
            assert lost["kv_groups"] < was.kv_groups and width >= min(multiple, was.channels_per_expert)
            assert width == was.channels_per_expert or width % multiple == 0
            left.append(replace(was.without(lost["kv_groups"]), channels_per_expert=width))
        layers = Layers(shape, left, multiple)
    now = sum(shape.layer_parameters(index, layer) for index, layer in enumerate(layers.now))
    missed = abs(shape.prunable_parameters - now - wanted)
    half = multiple * cost.channel / 2
    assert missed <= half + 1e-6 if accepted else missed > half - 1e-6 or missed >= wanted - half


def test_schedules_by_hand() -> None:
    assert cumulative_ratios(0.36, 2, "geometric") == pytest.approx([0.2, 0.36])
    assert cumulative_ratios(0.8, 2, "cubic") == pytest.approx([0.7, 0.8])
    assert cumulative_ratios(0.3, 1, "geometric") == cumulative_ratios(0.3, 1, "cubic") == [0.3]


def test_unreachable_ratio_names_the_nearest() -> None:
    shape = shape_from_config(make_model("llama", num_key_value_heads=1, num_attention_heads=2).config.to_dict())
    assert shape.max_ratio(None) == pytest.approx(3 * 128 * 144 / shape.prunable_parameters)
    with pytest.raises(PruningError, match=f"{shape.max_ratio(None):.6f}") as caught:
        shape.check_ratio(0.89)
    assert caught.value.code == "ratio_unreachable" and caught.value.field == "target_ratio"
    shape.check_ratio(shape.max_ratio(None) - 1e-4)
    with pytest.raises(PruningError, match="nearest"):
        shape.check_ratio(1e-6)
    block = 32 * 144 / shape.prunable_parameters
    assert shape.nearest_ratio(2.4 * block) == pytest.approx(2 * block)


def test_heads_give_the_same_share_however_many_rounds() -> None:
    shape = make_shape((3, 3, 1536), 30, LayerCost(294_912, 1728))  # SmolLM2-135M
    for rounds in (1, 4, 64):
        last = round_goals(shape, 0.2, rounds, "geometric", 32)[-1]
        # a fifth of 90 groups, and of the channels
        assert {name: round(gone) for name, gone in last.parameters.items()} == {
            "kv_groups": 18 * 294_912,
            "channels": 15_925_248,
        }


def test_narrow_layers_and_odd_widths_reach_what_they_can() -> None:
    narrow = make_shape((4, 4, 28), 2, LayerCost(1000, 10))  # all channels are one block: only heads can go
    assert narrow.max_ratio(256) == narrow.nearest_ratio(0.9, 256) == pytest.approx(6000 / 8560)
    narrow.check_ratio(6000 / 8560, 256)
    odd = make_shape((1, 4, 100), 1, LayerCost(1000, 10))  # 100 = 3 * 32 + 4
    odd.check_ratio(odd.max_ratio(32), 32)
    assert odd.max_ratio(32) == pytest.approx(680 / 2000)
    odd.check_ratio((680 + 150) / 2000, 32)  # half a block beyond the last step


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("uniform", [False, True])
def test_the_ratio_that_a_refusal_names_is_not_refused(name: str, uniform: bool) -> None:
    shape = shape_from_config(make_model(name).config.to_dict())
    with pytest.raises(PruningError, match="the nearest ratio") as caught:
        shape.check_ratio(1e-4, uniform=uniform)
    named = re.search(r"can be met is ([\d.]+)", str(caught.value))
    assert named is not None
    shape.check_ratio(float(named[1]), uniform=uniform)


def test_layers_that_are_alike_come_as_near_as_groups_and_steps_together_can() -> None:
    shape = shape_from_config(make_model("qwen3-moe", moe_intermediate_size=128).config.to_dict())
    depth = len(shape.layers)
    reachable = {
        depth
        * (groups * shape.price("kv_groups", 0) + steps * 32 * shape.price("channels", 0))
        / shape.prunable_parameters
        for groups in range(3)
        for steps in range(4)
    }
    for percent in range(5, 70):
        found = shape.nearest_ratio(percent / 100, uniform=True)
        assert any(abs(found - ratio) < 1e-9 for ratio in reachable)
        assert abs(found - percent / 100) <= max(0.01, min(abs(ratio - percent / 100) for ratio in reachable)) + 1e-9


@given(
    st.lists(st.integers(0, 50), min_size=1, max_size=12).map(sorted),
    st.floats(0, 60),
    st.integers(0, 40),
    st.integers(0, 90),
)
def test_the_nearest_amount_is_that_of_trying_all(choices: list[int], wished: float, rest: int, total: int) -> None:
    def miss(amount: int) -> float:
        return max(amount - total, total - amount - rest, 0)

    found = nearest_amount(wished, choices, rest, total)
    best = min((miss(amount), abs(amount - wished)) for amount in choices)
    assert found in choices and (miss(found), abs(found - wished)) == best
