"""Moments against stored activations, and each layer-wise recovery against a fit that stores them too."""

import copy
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast

from secateur.catalog.methods import DAMPING
from secateur.catalog.spec import PruningSpec
from secateur.contract.errors import PruningError
from secateur.engine.allocation.schedule import round_goals
from secateur.engine.measure.layer_stream import LayerStream, Moments
from secateur.engine.model.decoder import Decoder
from secateur.engine.recovery import LAYERWISE_RECOVERIES, Cut, least_squares
from secateur.engine.run.rounds import prune_round
from secateur.engine.scoring import LAYERWISE_SCORERS, Context, UnitContext
from secateur.engine.structures import WIDTHS
from tests.engine.models import VOCABULARY, decoder_of, make_model
from tests.engine.running import resolved

TOKENS = torch.randint(VOCABULARY, (5, 24), generator=torch.Generator().manual_seed(2))
KEPT: dict[str, list[list[int]]] = {
    "kv_groups": [[0, 2], [1], [0, 1, 2]],
    "channels": [list(range(0, 160, 2)), list(range(64)), list(range(5, 133))],
}


def activations(decoder: Decoder, index: int) -> dict[str, Tensor]:
    """Of one layer, from a plain forward: what enters it, leaves it, and reaches its projections; ``[tokens, ...]``."""
    layer, seen = decoder.layers[index], {}

    def keep(module: nn.Module, name: str) -> Any:
        return module.register_forward_hook(
            lambda _, args, out: seen.update({f"{name}-in": args[0] if args else None, f"{name}-out": out}),
        )

    hooks = [keep(layer.module, "layer")]
    for structure in WIDTHS:
        hooks += [
            keep(WIDTHS[structure].output(layer), structure),
            keep(WIDTHS[structure].inputs(layer)[0], f"{structure}-entering"),
        ]
    decoder.model(TOKENS)
    for hook in hooks:
        hook.remove()
    return {
        name: (value[0] if isinstance(value, tuple) else value).flatten(0, 1).double() for name, value in seen.items()
    }


def assert_close(found: Tensor, expected: Tensor, tolerance: float = 1e-4) -> None:
    assert found.shape == expected.shape
    assert float((found.double() - expected).norm() / expected.norm()) < tolerance


@pytest.mark.parametrize("name", ["llama", "llama-biased", "qwen3"])
@pytest.mark.parametrize("reference", ["none", "itself", "another"])
def test_moments_are_sums_over_stored_activations(
    name: str, reference: str, tokenizer: PreTrainedTokenizerFast
) -> None:
    """While layer after layer is cut: layers before, and heads before channels, are gone from what is seen."""
    decoder, whole = (decoder_of(make_model(name), tokenizer) for _ in range(2))
    stream = LayerStream(decoder, TOKENS, 2, {"none": None, "itself": decoder, "another": whole}[reference])
    for index, layer in enumerate(stream.layers()):
        wanted = activations(whole, index)
        targets = {"kv_groups": wanted["layer-in"] + wanted["kv_groups-out"], "channels": wanted["layer-out"]}
        for structure in WIDTHS:
            (found,), now = stream.moments(structure), activations(decoder, index)
            inputs, entering = now[f"{structure}-in"], now[f"{structure}-entering-in"]
            weights = torch.ones(len(inputs), 1, dtype=torch.float64)
            if reference == "none":
                assert found.missing is None
            else:
                weights = 1 / targets[structure].square().mean(1, keepdim=True)
                left = now["layer-in"] + now["kv_groups-out"] if structure == "kv_groups" else now["layer-out"]
                expected = (inputs * weights).T @ (targets[structure] - left)
                assert found.missing is not None
                if index == 0 and structure == "kv_groups":  # nothing is cut yet
                    assert float(found.missing.norm()) < 1e-4 * float((inputs * weights).norm())
                else:
                    assert_close(found.missing, expected, 1e-3)
            assert found.weight == pytest.approx(float(weights.sum()), rel=1e-4)
            assert_close(found.inputs, (weights * inputs).sum(0))
            assert_close(found.gram, (weights * inputs).T @ inputs)
            assert_close(found.entering, (weights * entering.square()).sum(0))
            mean = (weights * inputs).sum(0) / weights.sum()
            centred = inputs - mean
            assert_close(found.mean, mean)
            assert_close(found.covariance, (weights * centred).T @ centred / weights.sum(), 1e-3)
            WIDTHS[structure].cut(layer, KEPT[structure][index])
    assert_close(torch.cat(stream.hidden).flatten(0, 1), activations(decoder, 2)["layer-out"])


def problem(inputs: int = 12, out: int = 5) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Weight ``[out, in]``, correlated inputs ``[tokens, in]``, token weights ``[tokens, 1]``, e ``[tokens, out]``, kept."""
    generator = torch.Generator().manual_seed(7)

    def draw(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator, dtype=torch.float64)

    activations = draw(60, inputs) @ draw(inputs, inputs) + draw(inputs)
    return draw(out, inputs), activations, draw(60, 1).exp(), 3 * draw(60, out), torch.tensor([0, 1, 4, 5, 9, 11])


def moments_of(inputs: Tensor, weights: Tensor | None = None, missing: Tensor | None = None) -> Moments:
    weights = torch.ones(len(inputs), 1, dtype=inputs.dtype) if weights is None else weights
    weighted = weights * inputs
    return Moments(
        float(weights.sum()),
        weighted.sum(0).float(),
        (weighted.T @ inputs).float(),
        torch.zeros(1),
        None if missing is None else (weighted.T @ missing).float(),
    )


@pytest.mark.parametrize("damping", [0.01, 0.3, 3.0])
@pytest.mark.parametrize("with_missing", [False, True])
def test_least_squares_is_one_stacked_least_squares(damping: float, with_missing: bool) -> None:
    weight, inputs, token_weights, missing, kept = problem()
    moments = moments_of(inputs, token_weights, missing if with_missing else None)
    bias = torch.ones(5)
    found, same_bias = LAYERWISE_RECOVERIES["least-squares"](Cut(weight.float(), bias, moments, kept, damping))
    assert same_bias is bias
    used = token_weights.sqrt() * inputs[:, kept]
    ridge = (damping * used.square().sum(0).mean()).sqrt() * torch.eye(len(kept)).double()
    wanted = inputs @ weight.T + (least_squares.CARRIED * missing if with_missing else 0)
    stacked = torch.cat([used, ridge])
    expected = torch.linalg.lstsq(
        stacked, torch.cat([token_weights.sqrt() * wanted, ridge @ weight[:, kept].T])
    ).solution
    assert_close(found, expected.T, 1e-3)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_moments_that_are_not_finite_are_reported(value: float) -> None:
    weight, inputs, _, _, kept = problem()
    inputs[3, 4] = value
    with pytest.raises(PruningError) as caught:
        LAYERWISE_RECOVERIES["least-squares"](Cut(weight.float(), None, moments_of(inputs), kept, DAMPING))
    assert (caught.value.code, caught.value.field) == ("loss_not_finite", "dtype")


def test_linear_regression_is_a_line_for_every_output_dimension() -> None:
    weight, inputs, token_weights, _, kept = problem()
    bias = torch.arange(5.0)
    for weights in (torch.ones_like(token_weights), token_weights):
        moments = moments_of(inputs, weights)
        mended, offset = LAYERWISE_RECOVERIES["linear-regression"](Cut(weight.float(), bias, moments, kept, DAMPING))
        assert offset is not None
        for dimension in range(5):
            pruned, whole = inputs[:, kept] @ weight[dimension, kept], inputs @ weight[dimension] + dimension
            slope, intercept = np.polyfit(pruned.numpy(), whole.numpy(), 1, w=weights[:, 0].sqrt().numpy())
            assert_close(mended[dimension], slope * weight[dimension, kept], 1e-4)
            assert float(offset[dimension]) == pytest.approx(intercept, rel=1e-3)


def test_linear_regression_leaves_what_does_not_vary() -> None:
    weight, inputs, _, _, kept = problem()
    weight[2, kept] = 0
    mended, offset = LAYERWISE_RECOVERIES["linear-regression"](
        Cut(weight.float(), None, moments_of(inputs), kept, DAMPING)
    )
    assert offset is not None and bool(mended.isfinite().all()) and not mended[2].any()
    assert float(offset[2]) == pytest.approx(float((inputs @ weight[2]).mean()), rel=1e-3)


def test_bias_is_the_mean_of_what_went() -> None:
    weight, inputs, _, _, kept = problem()
    gone = [index for index in range(12) if index not in kept.tolist()]
    for bias in (None, torch.arange(5.0)):
        mended, offset = LAYERWISE_RECOVERIES["bias"](Cut(weight.float(), bias, moments_of(inputs), kept, DAMPING))
        expected = (inputs[:, gone] @ weight[:, gone].T).mean(0) + (0 if bias is None else bias)
        assert offset is not None and torch.equal(mended, weight[:, kept].float())
        assert_close(offset, expected)


@pytest.mark.parametrize("kind", LAYERWISE_RECOVERIES)
def test_every_recovery_comes_nearer_to_the_layer_than_truncation(kind: str) -> None:
    weight, inputs, _, _, kept = problem()
    whole = inputs @ weight.T
    mended, offset = LAYERWISE_RECOVERIES[kind](Cut(weight.float(), None, moments_of(inputs), kept, DAMPING))
    error = (inputs[:, kept] @ mended.double().T + (0 if offset is None else offset) - whole).square().sum()
    truncated = (inputs[:, kept] @ weight[:, kept].T - whole).square().sum()
    assert float(error) < 0.95 * float(truncated)


@pytest.mark.parametrize("kind", LAYERWISE_RECOVERIES)
def test_where_nothing_goes_nothing_changes(kind: str) -> None:
    weight, inputs, token_weights, _, _ = problem()
    cut_nothing = Cut(weight.float(), None, moments_of(inputs, token_weights), torch.arange(12), DAMPING)
    mended, offset = LAYERWISE_RECOVERIES[kind](cut_nothing)
    assert_close(mended, weight, 1e-4)
    assert offset is None or float(offset.abs().max()) < 1e-3 * float((inputs @ weight.T).abs().mean())
    if kind == "bias":
        assert offset is not None and torch.equal(mended, weight.float()) and not offset.any()


def pruned(decoder: Decoder, whole: Decoder, **recovery: Any) -> Decoder:
    spec = PruningSpec(target_ratio=0.4, method="wanda", recovery={"layerwise": recovery})
    asked = resolved(spec, decoder.shape)
    reference = whole if asked.components.fits_to_reference else None
    context = Context(decoder, TOKENS, 2, asked, 0.4, 0, lambda share: None, reference)
    prune_round(context, round_goals(decoder.shape, 0.4, 1, "geometric", 32)[0])
    return decoder


@pytest.mark.parametrize("recovery", ["none", "bias"])
def test_parts_that_give_nothing_are_not_scored(
    recovery: str, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoder, asked, taken = decoder_of(make_model("llama"), tokenizer), [], []
    score, moments = LAYERWISE_SCORERS["wanda"], LayerStream.moments

    def scored(context: UnitContext) -> Tensor:
        asked.append(context.removed)
        return score(context)

    def summed(stream: LayerStream, structure: str) -> list[Moments]:
        taken.append(structure)
        return moments(stream, structure)

    monkeypatch.setitem(LAYERWISE_SCORERS, "wanda", scored)
    monkeypatch.setattr(LayerStream, "moments", summed)
    spec = PruningSpec(target_ratio=0.1, method="wanda", recovery={"layerwise": {"kind": recovery}})
    context = Context(decoder, TOKENS, 2, resolved(spec, decoder.shape), 0.1, 0, lambda share: None)
    plan = prune_round(context, round_goals(decoder.shape, 0.1, 1, "geometric", 32)[0])
    gone = [whole - len(layer[name]) for name, whole in (("kv_groups", 3), ("channels", 160)) for layer in plan.layers]
    assert 0 in gone and sorted(asked) == sorted(count for count in gone if count)
    assert len(taken) == (len(asked) if recovery == "none" else len(gone))


@pytest.mark.parametrize(
    "recovery", [{"kind": kind} for kind in LAYERWISE_RECOVERIES] + [{"kind": "least-squares", "fit_to": "layer"}]
)
def test_a_mended_model_is_nearer_to_the_whole_one(
    recovery: dict[str, Any], trained: Any, tokenizer: PreTrainedTokenizerFast
) -> None:
    """What leaves the last layer, when every layer was mended on what the mended ones before it send on."""
    whole, plain, mended = (decoder_of(copy.deepcopy(trained), tokenizer) for _ in range(3))
    wanted = activations(whole, 2)["layer-out"]
    errors = [
        float((activations(pruned(decoder, whole, **asked), 2)["layer-out"] - wanted).square().sum())
        for decoder, asked in ((plain, {}), (mended, recovery))
    ]
    assert errors[1] < errors[0]
    layer = mended.layers[1]
    assert (layer.channel_output.bias is None) == (recovery["kind"] == "least-squares")
    assert not any(parameter.requires_grad for parameter in mended.model.parameters())
