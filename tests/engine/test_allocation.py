"""Every allocator against its budget, on made-up models of all shapes, and each against what it promises."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from secateur.catalog.architectures import LayerCost, LayerShape, ModelShape
from secateur.catalog.architectures.llama import LLAMA
from secateur.catalog.spec import PruningSpec
from secateur.contract.errors import PruningError
from secateur.engine.allocation import ALLOCATORS, LayerLimit, Layers, whole_units
from secateur.engine.allocation.base import Share, fill
from secateur.engine.measure.forward_statistics import ForwardStatistics
from secateur.engine.measure.gates import GateStatistics


def context_of(shape: ModelShape, ratio: float, seed: int, **allocation: Any) -> Any:
    """What an allocator looks at, drawn at random."""
    generator = torch.Generator().manual_seed(seed)

    def draw(count: int) -> Tensor:
        return torch.randn(count, generator=generator, dtype=torch.float64)

    widths = [{"kv_groups": layer.kv_groups, "channels": layer.channels_per_expert} for layer in shape.layers]
    gates = [{name: GateStatistics(draw(n), draw(n)) for name, n in layer.items()} for layer in widths]
    return SimpleNamespace(
        decoder=SimpleNamespace(shape=shape, layers=[SimpleNamespace(shape=layer) for layer in shape.layers]),
        resolved=SimpleNamespace(spec=PruningSpec(target_ratio=ratio, method="random", allocation=allocation)),
        target_ratio=ratio,
        gates=gates,
        forward_statistics=ForwardStatistics(draw(len(shape.layers)).tanh().tolist(), {}),
        scores={name: [draw(layer[name]) for layer in widths] for name in ("kv_groups", "channels")},
        details={},
    )


def limits_of(shape: ModelShape, multiple: int) -> list[LayerLimit]:
    return Layers(shape, shape.layers, multiple).limits


def make_shape(widths: list[tuple[int, int]], cost: LayerCost) -> ModelShape:
    layers = tuple(LayerShape(groups, groups, 16, channels) for groups, channels in widths)
    costs, widest = (cost,) * len(layers), max(layers, key=lambda layer: layer.channels)
    return ModelShape(LLAMA, "llama", 64, 100, True, 128, layers, costs, other_parameters=0, stock_layer=widest)


@st.composite
def problems(draw: st.DrawFn) -> tuple[ModelShape, int, float]:
    """Layers of different widths, as they are after a round, and a ratio that the door lets in."""
    multiple = draw(st.sampled_from([1, 8, 32]))
    widths = st.tuples(st.integers(1, 8), st.integers(1, multiple * 12))
    shape = make_shape(
        draw(st.lists(widths, min_size=2, max_size=8)),
        LayerCost(draw(st.integers(1, 5000)), draw(st.integers(1, 300))),
    )
    ratio = draw(st.floats(0.05, 0.9))
    try:
        shape.check_ratio(ratio, multiple)
    except PruningError:
        assume(False)
    return shape, multiple, ratio


@pytest.mark.parametrize("name", ALLOCATORS)
@settings(max_examples=150)
@given(problem=problems(), seed=st.integers(0, 100))
def test_every_allocator_spends_its_budget(name: str, problem: tuple[ModelShape, int, float], seed: int) -> None:
    shape, multiple, ratio = problem
    cost, limits, context = shape.costs[0], limits_of(shape, multiple), context_of(shape, ratio, seed)
    split = shape.split(ratio, multiple)
    total = sum(split.values())
    share = ALLOCATORS[name](context, limits, total)
    half = multiple * cost.channel / 2
    assert len(share.budgets) == len(limits)
    assert all(-1e-6 <= b <= limit.parameters + 1e-6 for b, limit in zip(share.budgets, limits, strict=True))
    assert sum(share.budgets) == pytest.approx(total, abs=max(half, 1e-6 * total))
    counts = whole_units(Layers(shape, shape.layers, multiple), share, split["kv_groups"], context.scores)
    for was, gone, limit in zip(shape.layers, counts, limits, strict=True):
        assert all(0 <= gone[name] <= most for name, most in limit.units.items())
        left = was.channels_per_expert - gone["channels"]
        assert gone["channels"] == 0 or left % multiple == 0
    given_up = sum(gone["kv_groups"] * cost.kv_group + gone["channels"] * cost.channel for gone in counts)
    assert abs(given_up - ratio * shape.prunable_parameters) <= half + 1e-6


SMOL = make_shape([(3, 1536)] * 30, LayerCost(294_912, 1728))


def budgets(name: str, shape: ModelShape, ratio: float, context: Any = None) -> Share:
    context = context or context_of(shape, ratio, 0)
    return ALLOCATORS[name](context, limits_of(shape, 32), ratio * shape.prunable_parameters)


def test_uniform_gives_the_same_ratio_everywhere() -> None:
    shape = make_shape([(3, 1536), (2, 96), (1, 640)], LayerCost(30_000, 100))
    sizes = [shape.layer_parameters(index) for index in range(len(shape.layers))]
    assert budgets("uniform", shape, 0.3).budgets == pytest.approx([0.3 * size for size in sizes])


def test_inner_spares_the_outer_layers() -> None:
    given_up = budgets("inner", SMOL, 0.2).budgets
    assert [index for index, budget in enumerate(given_up) if budget == 0] == [0, 1, 2, 3, 28, 29]
    assert given_up[4:28] == pytest.approx([0.2 * 30 / 24 * SMOL.prunable_parameters / 30] * 24)
    assert min(budgets("inner", SMOL, 0.85).budgets) > 0, "unless the others cannot do alone"


@pytest.mark.parametrize(("ratio", "alpha", "skipped"), [(0.1, 10, 6), (0.2, 10, 6), (0.5, 7, 2), (0.35, 8.5, 4)])
def test_cosine_is_equation_11_with_the_first_and_last_layer_kept(ratio: float, alpha: float, skipped: int) -> None:
    context = context_of(SMOL, ratio, 3)
    context.forward_statistics = ForwardStatistics([0.9 + 0.002 * (index * 7 % 30) for index in range(30)], {})
    cosines = context.forward_statistics.cosines
    given_up = budgets("cosine", SMOL, ratio, context).budgets
    kept = [index for index, budget in enumerate(given_up) if budget == 0]
    assert {0, 29} <= set(kept) and len(kept) == round(skipped / 32 * 30)
    inner = sorted(set(range(30)) - {0, 29}, key=cosines.__getitem__)
    assert set(kept) == {0, 29, *inner[: len(kept) - 2]}, "those that turn hidden states most"
    softmax = torch.tensor([cosines[index] for index in range(30) if index not in kept]).mul(alpha).softmax(0)
    wanted = (softmax * ratio * SMOL.prunable_parameters).tolist()
    assert [budget for budget in given_up if budget > 0] == pytest.approx(wanted, rel=1e-4)


def test_cosine_lets_every_layer_of_a_shallow_model_give() -> None:
    shape = make_shape([(4, 64)] * 4, LayerCost(10, 1))
    assert all(budget > 0 for budget in budgets("cosine", shape, 0.4, context_of(shape, 0.4, seed=0)).budgets)


def test_cosine_takes_the_alpha_of_the_request() -> None:
    context = context_of(SMOL, 0.3, 3, alpha=0)
    inner = [budget for budget in budgets("cosine", SMOL, 0.3, context).budgets if budget > 0]
    assert inner == pytest.approx([inner[0]] * len(inner)) and len(inner) < 29


def test_threshold_takes_the_lowest_scores_of_the_whole_model() -> None:
    shape = make_shape([(2, 4), (3, 4)], LayerCost(10, 3))
    context = context_of(shape, 0.2, 0)
    context.scores = {
        "kv_groups": [torch.tensor([0.5, 7.0]), torch.tensor([3.0, 0.2, 9.0])],
        "channels": [torch.tensor([0.1, 0.3, 8.0, 0.9]), torch.tensor([0.4, 5.0, 6.0, 0.6])],
    }
    limits = limits_of(shape, 1)
    # ascending: channel .1, group .2, channels .3 and .4, group .5, channels .6 and .9, group 3, channel 5 …
    for total, expected, groups in (
        (3, [3, 0], [0, 0]),
        (13, [3, 10], [0, 1]),
        (19, [6, 13], [0, 1]),
        (29, [16, 13], [1, 1]),
        (32, [16, 16], [1, 1]),
        (45, [19, 26], [1, 2]),
    ):
        share = ALLOCATORS["threshold"](context, limits, total)
        assert share.budgets == pytest.approx(expected) and share.units["kv_groups"] == groups, total


def test_lsps_falls_in_a_line_with_sensitivity() -> None:
    context = context_of(SMOL, 0.3, 0)
    found = torch.tensor(budgets("lsps", SMOL, 0.3, context).budgets)
    means = torch.stack([torch.cat([gate.gradient for gate in layer.values()]).abs().mean() for layer in context.gates])
    line = 1 - 0.9 * means / means.max()
    assert torch.allclose(found / found.sum(), (line / line.sum()).float(), rtol=1e-4)


def test_fill_asks_the_idle_only_when_it_must() -> None:
    assert fill([1, 0, 3], [10, 10, 10], 8) == [2, 0, 6]
    assert fill([1, 0, 3], [10, 10, 10], 16) == [6, 0, 10]
    assert fill([1, 0, 3], [10, 10, 10], 24) == [10, 4, 10]
