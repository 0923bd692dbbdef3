"""Blocks and sub-layers that leave: cutting them does what shielding does, in memory and in what is written."""

import copy
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from secateur.catalog.sources import locate
from secateur.engine.export import check_checkpoint, checkpoint
from secateur.engine.model.absent import Absent
from secateur.engine.model.cutting import padded
from secateur.engine.model.decoder import Decoder
from secateur.engine.model.loading import load
from secateur.engine.scoring.depth import Unit, can_leave
from secateur.engine.structures import STRUCTURES, WIDTHS, layers, sublayers
from secateur.engine.structures.caches import cache_numbers, number_caches
from tests.engine.models import FAMILIES, LIKE_LLAMA, VOCABULARY, make_model, save
from tests.tiers import slow_but

DEPTH = 5
KEPT = (0, 2, 3)
TOKENS = torch.randint(VOCABULARY, (2, 24), generator=torch.Generator().manual_seed(3))


UNITS: tuple[Unit, ...] = (("attention", 0), ("feed_forward", 2), ("attention", 3))
NAMES = [name for name in (*FAMILIES, *LIKE_LLAMA) if name != "chatglm6b"]


def deep(name: str, **changes: Any) -> PreTrainedModel:
    return make_model(
        name, **dict.fromkeys(("n_layer",) if name == "gpt2" else (), DEPTH), num_hidden_layers=DEPTH, **changes
    )


def loaded(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, folder: Path) -> tuple[Decoder, Any]:
    source = locate(str(save(model, tokenizer, folder / "source")), allow_paths=True)
    return load(source, "auto"), source


@contextmanager
def shielded(
    decoder: Decoder, blocks: tuple[int, ...] = (), outputs: tuple[tuple[int, str], ...] = ()
) -> Iterator[None]:
    """Let blocks return what entered them, and let output projections (``kv_groups``, ``channels``) return zeros."""

    def unchanged(_: Any, args: tuple[Tensor, ...], output: Any) -> Any:
        return (args[0], *output[1:]) if isinstance(output, tuple) else args[0]

    with ExitStack() as stack:
        for index in blocks:
            stack.callback(decoder.layers[index].module.register_forward_hook(unchanged).remove)
        for index, structure in outputs:
            output = WIDTHS[structure].output(decoder.layers[index])
            stack.callback(output.register_forward_hook(lambda _, args, output: torch.zeros_like(output)).remove)
        yield


def logits(decoder: Decoder) -> Tensor:
    with torch.no_grad():
        return decoder.model(TOKENS, use_cache=False).logits.float()


def written(model: PreTrainedModel, **options: Any) -> Tensor:
    """What the model writes after the tokens."""
    options = {"max_new_tokens": 10, "do_sample": False, "pad_token_id": 0, "eos_token_id": None, **options}
    return model.generate(TOKENS, attention_mask=torch.ones_like(TOKENS), **options)


def leave(decoder: Decoder, unit: Unit) -> None:
    """Remove a sub-layer from the model in place."""
    structure, index = unit
    STRUCTURES[structure].cut(decoder.layers[index], ())
    number_caches(decoder)


def same(one: Tensor, other: Tensor, tolerance: float = 1e-4) -> bool:
    return bool((one - other).abs().max() <= tolerance * other.abs().max())


@pytest.mark.parametrize("name", slow_but(["llama", "gemma3", "mixtral"], NAMES))
def test_cut_blocks_are_shielded_blocks(name: str, tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    decoder, source = loaded(deep(name), tokenizer, tmp_path)
    before = logits(decoder)
    with shielded(decoder, (1, 4)):
        expected = logits(decoder)
    layers.cut(decoder, KEPT)
    assert same(logits(decoder), expected) and not same(before, expected, 0.01)
    assert torch.equal(written(decoder.model), written(decoder.model, use_cache=False))
    write_blocks(decoder, source, tmp_path / "pruned")


@pytest.mark.parametrize("name", slow_but(["llama-tied"], ["llama-tied", "gemma2", "phi3"]))
def test_blocks_in_bfloat16(name: str, tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    decoder, source = loaded(deep(name).bfloat16(), tokenizer, tmp_path)
    with shielded(decoder, (1, 4)):
        expected = logits(decoder)
    layers.cut(decoder, KEPT)
    assert torch.equal(logits(decoder), expected)
    write_blocks(decoder, source, tmp_path / "pruned")


def write_blocks(decoder: Decoder, source: Any, folder: Path) -> None:
    """Write the model as one of the stock class, and let a new process load it and generate with a cache."""
    config = layers.written_config(source.config, decoder.model.config.to_dict(), decoder.shape.family)
    folder.mkdir()
    checkpoint.write_model(decoder, replace(source, config=config), folder, stock=True)
    own = decoder.shape.family.name == "chatglm6b"
    assert own == any(folder.glob("*.py"))
    check_checkpoint(decoder, folder, own_code=own)


def test_lists_of_the_config_follow(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    decoder, source = loaded(deep("smollm3", no_rope_layers=[1, 0, 1, 0, 0]), tokenizer, tmp_path)
    layers.cut(decoder, KEPT)
    config = layers.written_config(source.config, decoder.model.config.to_dict(), decoder.shape.family)
    assert config["no_rope_layers"] == [1, 1, 0] and config["num_hidden_layers"] == 3
    family = decoder.shape.family
    config = layers.config_with({"mlp_only_layers": [1, 3], "max_window_layers": 3}, family, KEPT)
    assert config == {"mlp_only_layers": [2], "max_window_layers": 2, "num_hidden_layers": 3}
    config = layers.config_with(
        {"mlp_only_layers": [3], "decoder_sparse_step": 2, "num_hidden_layers": 4}, family, KEPT
    )
    assert config == {"mlp_only_layers": [0, 1, 2], "decoder_sparse_step": 1, "num_hidden_layers": 3}


@pytest.mark.parametrize("name", slow_but(["llama", "gemma3", "mixtral"], NAMES))
def test_cut_sublayers_are_shielded_sublayers(name: str, tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    decoder, source = loaded(deep(name), tokenizer, tmp_path)
    before = logits(decoder)
    with shielded(decoder, outputs=((0, "kv_groups"), (2, "channels"), (3, "kv_groups"))):
        expected = logits(decoder)
    parameters = decoder.parameters
    gone: list[Unit] = []
    for unit in UNITS:
        assert can_leave(decoder, gone, unit)
        leave(decoder, unit)
        gone.append(unit)
    assert same(logits(decoder), expected) and not same(before, expected, 0.01)
    assert decoder.parameters < parameters
    assert [layer.shape.kv_groups == 0 for layer in decoder.layers] == [True, False, False, True, False]
    assert [layer.shape.channels == 0 for layer in decoder.layers] == [False, False, True, False, False]
    for cache in ("dynamic", "static"):
        assert torch.equal(written(decoder.model, cache_implementation=cache), written(decoder.model, use_cache=False))
    assert same(logits(copy.deepcopy(decoder)), expected)
    folder = tmp_path / "stock"
    folder.mkdir()
    with sublayers.held(decoder), padded(decoder):
        assert same(logits(decoder), expected)
        checkpoint.write_model(decoder, source, folder, stock=True)
        check_checkpoint(decoder, folder, own_code=name == "chatglm6b")
    assert same(logits(decoder), expected)
    assert isinstance(
        decoder.layers[0].module.get_submodule(sublayers.modules(decoder.shape.family, "attention")[0]), Absent
    )


def test_the_last_attention_of_its_kind_stays(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    model = deep("gemma3", layer_types=["sliding_attention", "full_attention", *["sliding_attention"] * 3])
    decoder, _ = loaded(model, tokenizer, tmp_path)
    assert [index for index in range(DEPTH) if can_leave(decoder, [], ("attention", index))] == [0, 2, 3, 4]
    gone: list[Unit] = [("attention", 0)]
    leave(decoder, gone[0])
    assert [index for index in range(DEPTH) if can_leave(decoder, gone, ("attention", index))] == [2, 3, 4]
    assert not can_leave(decoder, gone, ("feed_forward", 0))
    assert torch.equal(written(decoder.model), written(decoder.model, use_cache=False))


def test_caches_are_counted_by_kind() -> None:
    assert cache_numbers(None, [False, True, True]) == {1: 0, 2: 1}
    kinds = ["sliding", "full", "sliding", "full", "sliding"]
    assert cache_numbers(kinds, [False, False, True, True, True]) == {2: 0, 3: 1, 4: 2}
