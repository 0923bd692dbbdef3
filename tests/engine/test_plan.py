"""Plan arithmetic against hand counts, budgets against their targets."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from app.catalog.architectures import LayerShape, UnitCost, shape_from_config
from app.catalog.errors import PruningError
from tests.engine.models import FAMILIES, decoder_of, make_model
from workers.engine.allocation.base import fill
from workers.engine.allocation.budget import select_units
from workers.engine.plan import LayerPlan, Plan
from workers.engine.schedule import cumulative_ratios
from workers.engine.scoring import Scores


@pytest.mark.parametrize("name", FAMILIES)
def test_shape_counts_what_the_model_has(name: str, tokenizer: PreTrainedTokenizerFast) -> None:
    model = make_model(name)
    shape = shape_from_config(model.config.to_dict())
    assert shape.parameters == sum(parameter.numel() for parameter in model.parameters())
    blocks = ("_proj.weight", "_proj.bias")
    assert shape.prunable_parameters == sum(p.numel() for n, p in model.named_parameters() if n.endswith(blocks))
    assert decoder_of(model, tokenizer).prunable_parameters == shape.prunable_parameters


def test_unit_costs_by_hand() -> None:
    shape = shape_from_config(make_model("llama").config.to_dict())
    # hidden 48, 6 heads of 8 in 3 groups: 2 heads' q rows and o columns, one k row block, one v row block
    assert shape.cost == UnitCost(kv_group=48 * (16 + 8 + 8 + 16), channel=3 * 48, fixed=0)
    assert shape.layers[0] == LayerShape(kv_groups=3, heads=6, head_dim=8, intermediate_size=160)


def test_plans_compose() -> None:
    first = Plan((LayerPlan((0, 2), (1, 3, 5, 7)),))
    assert first.then(Plan((LayerPlan((1,), (0, 3)),))) == Plan((LayerPlan((2,), (1, 7)),))
    assert Plan.from_dict(first.as_dict()) == first
    assert Plan((LayerPlan((0,), (0, 1, 2, 7, 9, 10)),)).as_dict() == [
        {"kv_groups": [0], "channels": [[0, 2], [7, 7], [9, 10]]}
    ]


def test_selection_by_hand() -> None:
    shapes = [LayerShape(2, 2, 4, 8)] * 2
    cost = UnitCost(kv_group=40, channel=10, fixed=0)  # 160 a layer
    scores = Scores(
        [torch.tensor([1.0, 2.0]), torch.tensor([4.0, 3.0])],
        [torch.arange(8.0), -torch.arange(8.0)],
    )
    plan = select_units(shapes, scores, [80, 40], cost, width_multiple=2)
    # layer 0 gives half: one group (score 1) and 4 channels; layer 1 a quarter: half a group rounds to even, 0 or 1
    assert plan.layers[0] == LayerPlan((1,), (4, 5, 6, 7))
    assert plan.layers[1] in (LayerPlan((0, 1), (0, 1, 2, 3)), LayerPlan((0,), tuple(range(8))))
    left = sum(len(layer.kv_groups) * 40 + len(layer.channels) * 10 for layer in plan.layers)
    assert left == 320 - 120


@st.composite
def problems(draw: st.DrawFn) -> tuple[list[LayerShape], UnitCost, int, list[float], float]:
    per_group, multiple = draw(st.integers(1, 4)), draw(st.sampled_from([1, 8, 32]))
    shapes = [
        LayerShape(groups, groups * per_group, 16, draw(st.integers(multiple, multiple * 12)))
        for groups in draw(st.lists(st.integers(1, 8), min_size=1, max_size=8))
    ]
    cost = UnitCost(draw(st.integers(1, 5000)), draw(st.integers(1, 300)), fixed=0)
    weights = draw(st.lists(st.floats(0.05, 1), min_size=len(shapes), max_size=len(shapes)))
    return shapes, cost, multiple, weights, draw(st.floats(0.05, 0.9))


@settings(max_examples=200, deadline=None)
@given(problems(), st.integers(0, 100))
def test_budgets_are_met_to_within_a_block(
    problem: tuple[list[LayerShape], UnitCost, int, list[float], float], seed: int
) -> None:
    shapes, cost, multiple, weights, ratio = problem
    limits = [
        (s.kv_groups - 1) * cost.kv_group + (s.intermediate_size - min(multiple, s.intermediate_size)) * cost.channel
        for s in shapes
    ]
    total = sum(s.kv_groups * cost.kv_group + s.intermediate_size * cost.channel for s in shapes)
    wanted = min(ratio * total, sum(limits))
    budgets = fill(weights, limits, wanted)
    assert sum(budgets) == pytest.approx(wanted) and all(
        b <= limit + 1e-6 for b, limit in zip(budgets, limits, strict=True)
    )
    torch.manual_seed(seed)
    scores = Scores([torch.rand(s.kv_groups) for s in shapes], [torch.rand(s.intermediate_size) for s in shapes])
    plan = select_units(shapes, scores, budgets, cost, multiple)
    removed = 0
    for shape, kept, heads, channels in zip(shapes, plan.layers, scores.heads, scores.channels, strict=True):
        width = len(kept.channels)
        assert len(kept.kv_groups) >= 1 and width >= min(multiple, shape.intermediate_size)
        assert width == shape.intermediate_size or width % multiple == 0
        for units, values in ((kept.kv_groups, heads), (kept.channels, channels)):
            gone = [float(v) for i, v in enumerate(values) if i not in set(units)]
            assert not gone or max(gone) <= min(float(values[i]) for i in units)
        removed += (shape.kv_groups - len(kept.kv_groups)) * cost.kv_group + (
            shape.intermediate_size - width
        ) * cost.channel
    slack = sum(s.intermediate_size // multiple for s in shapes) > 2 * len(shapes)
    if slack and wanted < sum((s.intermediate_size - 2 * multiple) * cost.channel for s in shapes):
        assert abs(removed - wanted) <= max(multiple * cost.channel / 2, 1)
    else:
        assert abs(removed - wanted) <= max(cost.kv_group, multiple * cost.channel)


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
