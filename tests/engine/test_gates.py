"""Gate gradients against finite differences, shielding against zeroed weights, the estimate against shielding."""

import copy

import torch
from scipy.stats import spearmanr
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from secateur.engine.measure.gates import gate_statistics, shielded_loss_change
from secateur.engine.model.decoder import Decoder, token_losses
from secateur.engine.structures import WIDTHS, gated
from tests.engine.models import VOCABULARY, decoder_of, english, make_model


def ignore(share: float) -> None:
    pass


def tokens_of(tokenizer: PreTrainedTokenizerFast, windows: int, length: int) -> Tensor:
    ids = tokenizer("\n".join(english("evaluation"))).input_ids[: windows * length]
    return torch.tensor(ids).view(windows, length)


def loss(model: PreTrainedModel, tokens: Tensor) -> float:
    with torch.no_grad():
        return float(token_losses(model(tokens).logits, tokens).double().mean())


def test_gradients_match_finite_differences(tokenizer: PreTrainedTokenizerFast) -> None:
    decoder = decoder_of(make_model("llama").double(), tokenizer)
    tokens = torch.randint(VOCABULARY, (3, 12), generator=torch.Generator().manual_seed(1))
    statistics = gate_statistics(decoder, tokens, batch_windows=2, progress=ignore)
    step = 2e-3  # norms compute in float32 whatever the model: smaller steps drown in its rounding
    for index, layer in enumerate(decoder.layers):
        for kind, step_of_units in (("kv_groups", 1), ("channels", 37)):
            found = statistics[index][kind].gradient
            for unit in range(0, WIDTHS[kind].units(layer), step_of_units):
                values = []
                for sign in (1, -1):
                    gate = torch.ones(1, len(found), dtype=torch.float64)
                    gate[0, unit] += sign * step
                    with gated(layer, {kind: gate}):
                        values.append(loss(decoder.model, tokens))
                expected = (values[0] - values[1]) / (2 * step)
                assert abs(float(found[unit]) - expected) < 2e-4 + 0.01 * abs(expected)


def test_curvature_is_the_mean_squared_gradient_by_window(tokenizer: PreTrainedTokenizerFast) -> None:
    decoder = decoder_of(make_model("llama").double(), tokenizer)
    tokens = torch.randint(VOCABULARY, (3, 12), generator=torch.Generator().manual_seed(1))
    together = gate_statistics(decoder, tokens, batch_windows=3, progress=ignore)
    alone = [gate_statistics(decoder, window[None], batch_windows=1, progress=ignore) for window in tokens]
    for index, layer in enumerate(together):
        by_window = torch.stack([window[index]["channels"].gradient * 11 for window in alone])  # of the summed loss
        assert torch.allclose(layer["channels"].gradient, by_window.mean(0) / 11)
        assert torch.allclose(layer["channels"].curvature, by_window.square().mean(0) / 11)


def test_shielding_equals_zeroed_weights(tokenizer: PreTrainedTokenizerFast) -> None:
    decoder = decoder_of(make_model("qwen2"), tokenizer)
    tokens = torch.randint(VOCABULARY, (3, 12), generator=torch.Generator().manual_seed(1))
    base = loss(decoder.model, tokens)
    for batch_windows in (1, 8):
        changes = shielded_loss_change(decoder, tokens, batch_windows, ignore)
        for index, layer in enumerate(decoder.layers):
            for group in range(WIDTHS["kv_groups"].units(layer)):
                shielded = copy.deepcopy(decoder.model)
                columns = slice(group * layer.group_width, (group + 1) * layer.group_width)
                shielded.model.layers[index].self_attn.o_proj.weight[:, columns] = 0
                assert abs(float(changes[index][group]) - (loss(shielded, tokens) - base)) < 1e-5


def exact_channel_changes(decoder: Decoder, tokens: Tensor, index: int) -> Tensor:
    layer, base = decoder.layers[index], loss(decoder.model, tokens)
    units = WIDTHS["channels"].units(layer)
    changes = []
    for channel in range(units):
        gate = torch.ones(1, units)
        gate[0, channel] = 0
        with gated(layer, {"channels": gate}):
            changes.append(loss(decoder.model, tokens) - base)
    return torch.tensor(changes)


def test_estimated_loss_change_ranks_like_exact_shielding(
    trained: PreTrainedModel, tokenizer: PreTrainedTokenizerFast
) -> None:
    decoder = decoder_of(trained, tokenizer)
    tokens = tokens_of(tokenizer, windows=12, length=64)
    statistics = gate_statistics(decoder, tokens, batch_windows=8, progress=ignore)
    for index in (0, 2):
        exact = exact_channel_changes(decoder, tokens, index)
        assert spearmanr(statistics[index]["channels"].loss_change, exact).statistic > 0.8
        assert spearmanr(-statistics[index]["channels"].gradient, exact).statistic > 0.5
    heads = torch.cat(shielded_loss_change(decoder, tokens, 8, ignore))
    estimate = torch.cat([layer["kv_groups"].loss_change for layer in statistics])
    assert spearmanr(estimate, heads).statistic > 0.6


def test_float16_gradients_survive(trained: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> None:
    tokens = tokens_of(tokenizer, windows=8, length=64)
    exact = gate_statistics(decoder_of(trained, tokenizer), tokens, 8, ignore)
    half = gate_statistics(decoder_of(copy.deepcopy(trained).half(), tokenizer), tokens, 8, ignore)
    for single, rounded in zip(exact, half, strict=True):
        assert spearmanr(single["channels"].gradient.abs(), rounded["channels"].gradient.abs()).statistic > 0.95
