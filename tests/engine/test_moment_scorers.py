"""Layer-wise scorers against twins that store every activation, really drop units and really refit."""

import copy
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from secateur.catalog.spec import PruningSpec, Scoring
from secateur.engine.allocation import best
from secateur.engine.measure.layer_stream import LayerStream
from secateur.engine.model.decoder import Decoder
from secateur.engine.scoring import LAYERWISE_SCORERS, Context, UnitContext, flap, second_order
from secateur.engine.structures import WIDTHS
from tests.engine.models import VOCABULARY, decoder_of, make_model
from tests.engine.running import resolved

TOKENS = torch.randint(VOCABULARY, (5, 24), generator=torch.Generator().manual_seed(2))
MODELS: dict[str, dict[str, Any]] = {
    "llama-biased": {},
    "qwen2": {},
    "llama-multi-head": {"num_attention_heads": 12, "num_key_value_heads": 12},
}
Where = tuple[int, str]


@pytest.fixture(scope="module", params=MODELS)
def decoder(request: pytest.FixtureRequest, tokenizer: PreTrainedTokenizerFast) -> Decoder:
    return decoder_of(make_model(request.param, **MODELS[request.param]).double(), tokenizer)


def places(decoder: Decoder) -> Iterator[Where]:
    return ((index, structure) for index in range(len(decoder.layers)) for structure in WIDTHS)


def stored(decoder: Decoder, where: Where) -> tuple[Tensor, Tensor, Tensor]:
    """What enters a structure, what enters its output projection and what leaves that: ``[tokens, ...]``, from a plain forward."""
    index, structure = where
    layer = decoder.layers[index]
    seen: dict[str, Tensor] = {}
    hooks = [
        WIDTHS[structure].inputs(layer)[-1].register_forward_hook(lambda _, args, __: seen.update(entering=args[0])),
        WIDTHS[structure]
        .output(layer)
        .register_forward_hook(lambda _, args, out: seen.update(inputs=args[0], leaving=out)),
    ]
    decoder.model(TOKENS)
    for hook in hooks:
        hook.remove()
    return seen["entering"].flatten(0, 1), seen["inputs"].flatten(0, 1), seen["leaving"].flatten(0, 1)


def scored(decoder: Decoder, where: Where, scorer: str, removed: int = 1, **settings: Any) -> Tensor:
    index, structure = where
    stream = LayerStream(decoder, TOKENS, 2, None)
    for number, layer in enumerate(stream.layers()):
        if number == index:
            context = UnitContext(
                layer, WIDTHS[structure], 0, stream.moments(structure)[0], removed, Scoring(**settings)
            )
            return LAYERWISE_SCORERS[scorer](context).double()
    raise AssertionError


def units_of(decoder: Decoder, where: Where, values: Tensor, dim: int = 0) -> tuple[Tensor, ...]:
    """``values`` cut along ``dim`` into what belongs to each unit."""
    return values.chunk(WIDTHS[where[1]].units(decoder.layers[where[0]]), dim)


def assert_close(found: Tensor, expected: list[float] | Tensor, tolerance: float = 1e-4) -> None:
    expected = torch.as_tensor(expected, dtype=torch.float64)
    assert found.shape == expected.shape and float((found - expected).norm() / expected.norm()) < tolerance


def test_wanda(decoder: Decoder) -> None:
    for where in places(decoder):
        _, inputs, _ = stored(decoder, where)
        weight = WIDTHS[where[1]].output(decoder.layers[where[0]]).weight
        metric = torch.stack([weight[:, j].abs().mean() * inputs[:, j].norm() for j in range(weight.shape[1])])
        assert_close(scored(decoder, where, "wanda"), [float(u.sum()) for u in units_of(decoder, where, metric)])


def group_importance(decoder: Decoder, where: Where) -> list[float]:
    """LoRAP's: a norm for each projection, over all weights of the unit scaled by the norms of what they multiply."""
    layer, structure = decoder.layers[where[0]], where[1]
    entering, inputs, _ = stored(decoder, where)
    scaled = [units_of(decoder, where, WIDTHS[structure].output(layer).weight * inputs.norm(dim=0), 1)]
    scaled += [
        units_of(decoder, where, linear.weight * entering.norm(dim=0)) for linear in WIDTHS[structure].inputs(layer)
    ]
    return [sum(float(piece.norm()) for piece in pieces) for pieces in zip(*scaled, strict=True)]


def test_lorap(decoder: Decoder) -> None:
    for where in places(decoder):
        expected, found = torch.tensor(group_importance(decoder, where)), scored(decoder, where, "lorap")
        order = expected.argsort()
        spared = order[:2] if where[1] == "channels" else order[:0]  # a hundredth of 160
        assert set(found.isinf().nonzero()[:, 0].tolist()) == set(spared.tolist())
        assert_close(found[order[len(spared) :]], expected[order[len(spared) :]])


def pearson(one: Tensor, other: Tensor) -> float:
    """Σ over output dimensions of |Pearson over tokens|, of two ``[tokens, out]``."""
    dimensions = zip(one.T.numpy(), other.T.numpy(), strict=True)
    return float(sum(abs(np.corrcoef(a, b)[0, 1]) for a, b in dimensions))


def similarities(decoder: Decoder, where: Where) -> list[float]:
    """Of attention's output and its output when a head is cut out of the model, by head."""
    index, structure = where
    _, _, whole = stored(decoder, where)
    found = []
    for gone in range(WIDTHS[structure].units(decoder.layers[index])):
        without = decoder_of(copy.deepcopy(decoder.model), decoder.tokenizer)
        layer, cut = without.layers[index], WIDTHS[structure]
        cut.cut(layer, [unit for unit in range(cut.units(layer)) if unit != gone])
        found.append(pearson(stored(without, where)[2], whole))
    return found


def test_slimllm_drops_the_head_whose_absence_is_least_seen(decoder: Decoder) -> None:
    for index in range(3):
        expected = similarities(decoder, (index, "kv_groups"))
        assert_close(-scored(decoder, (index, "kv_groups"), "slimllm", greedy_swaps=False), expected, 1e-6)


def algorithm_1(outputs: list[Tensor], expected: list[float], removed: int) -> set[int]:
    """Kept heads after one pass over the pruned ones, each put where it helps most, if it helps."""
    everything = sum(outputs, torch.zeros(1))
    order = sorted(range(len(outputs)), key=expected.__getitem__)
    kept, pruned = order[: len(order) - removed], order[::-1][:removed]
    reached = pearson(sum((outputs[head] for head in kept), torch.zeros(1)), everything)
    for head in pruned:
        trials = [[*kept[:place], head, *kept[place + 1 :]] for place in range(len(kept))]
        values = [pearson(sum((outputs[one] for one in trial), torch.zeros(1)), everything) for trial in trials]
        if max(values) > reached:
            reached, kept = max(values), trials[values.index(max(values))]
    return set(kept)


def test_slimllm_swaps_by_algorithm_1(tokenizer: PreTrainedTokenizerFast) -> None:
    swapped = 0
    decoder = decoder_of(make_model("llama-multi-head", **MODELS["llama-multi-head"]).double(), tokenizer)
    for index in range(3):
        where: Where = (index, "kv_groups")
        _, inputs, _ = stored(decoder, where)
        weights = units_of(decoder, where, decoder.layers[index].attention_output.weight, 1)
        outputs = [x @ w.T for x, w in zip(units_of(decoder, where, inputs, 1), weights, strict=True)]
        expected = similarities(decoder, where)
        for removed in (1, 5, 9, 11):
            plain = set(best(scored(decoder, where, "slimllm", removed, greedy_swaps=False), removed))
            assert plain == set(sorted(range(12), key=expected.__getitem__)[: 12 - removed])
            kept = set(best(scored(decoder, where, "slimllm", removed), removed))
            assert kept == algorithm_1(outputs, expected, removed)
            swapped += kept != plain
    assert swapped >= 3, "or the search was not tried"


def feature_importance(decoder: Decoder, where: Where) -> Tensor:
    """Equations 5 to 8, from a singular value decomposition of the outputs that were stored."""
    layer, (entering, inputs, leaving) = decoder.layers[where[0]], stored(decoder, where)
    _, values, directions = np.linalg.svd((leaving - leaving.mean(0)).numpy(), full_matrices=False)
    factors = 1 / (1 + np.exp(-(values**2) / (values**2).mean()))
    rotated = (layer.channel_output.weight.numpy().T @ directions.T) * factors
    total = torch.tensor(np.linalg.norm(rotated, axis=1)) * inputs.norm(dim=0)
    for linear in WIDTHS["channels"].inputs(layer):
        total = total + (linear.weight * entering.norm(dim=0)).norm(dim=1)
    return total


def test_slimllm_weighs_channels_in_feature_space_and_spares_the_lowest(decoder: Decoder) -> None:
    for index in range(3):
        where: Where = (index, "channels")
        lorap = torch.tensor(group_importance(decoder, where), dtype=torch.float64)
        for expected, feature_space in ((feature_importance(decoder, where), True), (lorap, False)):
            order = expected.argsort()
            found = scored(decoder, where, "slimllm", 50, feature_space=feature_space)
            assert set(found.isinf().nonzero()[:, 0].tolist()) == set(order[:2].tolist())  # a hundredth of 160
            assert_close(found[order[2:]], expected[order[2:]])
            assert set(best(found, 50)) == set(order[:2].tolist()) | set(order[52:].tolist())
    assert len(best(scored(decoder, where, "slimllm", 159), 159)) == 1, "nothing is spared that must go"


def test_flap(decoder: Decoder) -> None:
    spec = PruningSpec(target_ratio=0.2, method="flap")
    found = flap.score(Context(decoder, TOKENS, 2, resolved(spec, decoder.shape), 0.2, 0, lambda share: None))
    for where in places(decoder):
        _, inputs, _ = stored(decoder, where)
        weight = WIDTHS[where[1]].output(decoder.layers[where[0]]).weight.numpy()
        metric = inputs.numpy().var(axis=0) * (weight**2).sum(axis=0)
        metric = metric**2 if where[1] == "kv_groups" else metric
        standard = torch.tensor((metric - metric.mean()) / metric.std(ddof=1))
        expected = [float(unit.mean()) for unit in units_of(decoder, where, standard)]
        assert_close(found[where[1]][where[0]], expected, 1e-8)


def refit_error(weight: Tensor, inputs: Tensor, gone: list[int]) -> float:
    """‖(W − W')·X‖² + ridge·‖W − W'‖² at its least, where W' has none of the inputs ``gone``: one stacked least squares."""
    gram = inputs.T @ inputs
    ridge = float(second_order.DAMPING * gram.diagonal().mean())
    stacked = torch.cat([inputs, ridge**0.5 * torch.eye(inputs.shape[1], dtype=inputs.dtype)])
    wanted = stacked @ weight.T
    stays = [index for index in range(inputs.shape[1]) if index not in gone]
    if not stays:
        return float(wanted.square().sum())
    solution = torch.linalg.lstsq(stacked[:, stays], wanted, driver="gelsd").solution
    return float((stacked[:, stays] @ solution - wanted).square().sum())


def problem(inputs: int) -> tuple[Tensor, Tensor]:
    """A weight ``[7, inputs]`` and correlated inputs ``[40, inputs]``."""
    generator = torch.Generator().manual_seed(inputs)
    mixed = torch.randn(inputs, inputs, generator=generator, dtype=torch.float64)
    return (
        torch.randn(7, inputs, generator=generator, dtype=torch.float64),
        torch.randn(40, inputs, generator=generator, dtype=torch.float64) @ mixed + 0.3,
    )


@pytest.mark.parametrize(("inputs", "width"), [(10, 1), (15, 3), (16, 4)])
def test_obs_is_greedy_refitting_from_scratch(inputs: int, width: int) -> None:
    weight, activations = problem(inputs)
    order = second_order.eliminate(weight.float(), (activations.T @ activations).float(), width, inputs // width - 1)
    gone: list[int] = []

    def columns(units: list[int]) -> list[int]:
        return [unit * width + offset for unit in units for offset in range(width)]

    for unit in order.tolist():
        candidates = {
            one: refit_error(weight, activations, columns([*gone, one]))
            for one in range(inputs // width)
            if one not in gone
        }
        assert unit == min(candidates, key=candidates.__getitem__)
        gone = [*gone, unit]


def test_obs_in_large_steps_is_nearly_as_good(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, activations = problem(24)
    gram = (activations.T @ activations).float()
    one_by_one = second_order.eliminate(weight.float(), gram, 1, 12).tolist()
    monkeypatch.setattr(second_order, "STEPS", 6)  # 4 at once
    order = second_order.eliminate(weight.float(), gram, 1, 12).tolist()
    assert len(set(order)) == 12
    others = [unit for unit in range(24) if unit not in order]
    least, found, most = (refit_error(weight, activations, gone) for gone in (one_by_one, order, others))
    assert found < (least + most) / 2


def test_obs_scores_are_its_order(decoder: Decoder) -> None:
    for where in places(decoder):
        _, inputs, _ = stored(decoder, where)
        layer = decoder.layers[where[0]]
        removed = WIDTHS[where[1]].units(layer) // 2
        gram, weight = (inputs.T @ inputs).float(), WIDTHS[where[1]].output(layer).weight.float()
        order = second_order.eliminate(weight, gram, WIDTHS[where[1]].width(layer), removed)
        kept = best(scored(decoder, where, "obs", removed), removed)
        assert set(kept) == set(range(WIDTHS[where[1]].units(layer))) - set(order.tolist())
