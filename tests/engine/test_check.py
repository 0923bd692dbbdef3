"""The check of a written checkpoint passes a right one and refuses a wrong one, in every dtype."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast

from secateur.catalog.sources import locate
from secateur.contract.errors import PruningError
from secateur.engine.export import check, check_checkpoint, checkpoint
from secateur.engine.model.cutting import apply_plan
from secateur.engine.model.decoder import Decoder
from secateur.engine.model.in_float32 import InFloat32
from secateur.engine.model.loading import load
from secateur.engine.model.plan import Plan
from tests.engine.models import layer_plan, make_model, save
from tests.engine.test_slicing import of_each

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
OUTPUT, QUERY = "model.layers.0.mlp.down_proj.weight", "model.layers.0.self_attn.q_proj.weight"


def written(
    name: str, dtype: torch.dtype, tokenizer: PreTrainedTokenizerFast, folder: Path, seed: int = 0
) -> tuple[Decoder, Path]:
    """A model of the family that lost every second channel, and where it was written: as its stock class."""
    source = locate(str(save(make_model(name, seed).to(dtype), tokenizer, folder / "source")), allow_paths=True)
    decoder, out = load(source, "auto"), folder / "pruned"
    kept = layer_plan(range(decoder.shape.layers[0].kv_groups), of_each(decoder.shape, range(0, 160, 2)))
    apply_plan(decoder, Plan((kept,) * len(decoder.layers)))
    out.mkdir()
    checkpoint.write_model(decoder, source, out, True)
    return decoder, out


def in_weights(fault: Callable[[dict[str, Tensor]], None]) -> Callable[[Path], None]:
    """Return what plants a fault in the tensors of a checkpoint."""

    def plant(folder: Path) -> None:
        weights = load_file(folder / "model.safetensors")
        fault(weights)
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})

    return plant


def swap(name: str, dim: int, size: int) -> Callable[[Path], None]:
    """Return what swaps the first and the last ``size`` rows (0) or columns (1) of a weight."""

    def fault(weights: dict[str, Tensor]) -> None:
        count = weights[name].shape[dim]
        order = torch.arange(count)
        order[:size], order[-size:] = torch.arange(count - size, count), torch.arange(size)
        weights[name] = weights[name].index_select(dim, order).contiguous()

    return in_weights(fault)


def lose_a_bias(weights: dict[str, Tensor]) -> None:
    weights["model.layers.0.self_attn.v_proj.bias"].zero_()


def change(**values: object) -> Callable[[Path], None]:
    def plant(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, **values}))

    return plant


IN_TENSORS = {
    "two channels swapped": swap(OUTPUT, 1, 1),
    "a head in another group": swap(QUERY, 0, 8),
    "a bias lost": in_weights(lose_a_bias),
}
FAULTS = {
    **IN_TENSORS,
    "rotated too far": change(rope_theta=11_000.0, rope_parameters={"rope_type": "default", "rope_theta": 11_000.0}),
    "a norm that divides by more": change(rms_norm_eps=1e-2),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_wrong_checkpoint_is_refused(
    dtype: torch.dtype, tokenizer: PreTrainedTokenizerFast, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each fault is refused by its logits alone; a fault in the tensors is refused by its tensor, too."""
    decoder, out = written("qwen2", dtype, tokenizer, tmp_path)
    check_checkpoint(decoder, out, own_code=False)
    right = {file.name: file.read_bytes() for file in out.iterdir()}
    for name, plant in FAULTS.items():
        plant(out)
        if name in IN_TENSORS:
            with pytest.raises(PruningError, match="is not the model's") as caught:
                check_checkpoint(decoder, out, own_code=False)
            assert caught.value.code == "export_invalid"
        with monkeypatch.context() as patch:
            patch.setattr(check, "_check_tensors", lambda decoder, folder: None)
            with pytest.raises(PruningError, match="logits differ"):
                check_checkpoint(decoder, out, own_code=False)
        for file, content in right.items():
            (out / file).write_bytes(content)


def test_missing_and_surplus_tensors_are_refused(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoder, out = written("llama", torch.float32, tokenizer, tmp_path)
    weights = load_file(out / "model.safetensors")
    save_file({**weights, "surplus": torch.zeros(1)}, out / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(PruningError, match="the model has no tensor surplus"):
        check_checkpoint(decoder, out, own_code=False)
    norm = weights.pop("model.norm.weight")
    save_file(weights, out / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(PruningError, match=r"model\.norm\.weight is missing"):
        check_checkpoint(decoder, out, own_code=False)
    with monkeypatch.context() as patch:
        patch.setattr(check, "_check_tensors", lambda decoder, folder: None)
        with pytest.raises(PruningError, match="do not fit"):
            check_checkpoint(decoder, out, own_code=False)
    save_file({**weights, "model.norm.weight": -norm}, out / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(PruningError, match=r"model\.norm\.weight is not the"):
        check_checkpoint(decoder, out, own_code=False)


@pytest.mark.parametrize("name", ["mixtral", "qwen3-moe"])
@pytest.mark.parametrize("seed", [0, 1])
def test_a_mixture_in_half_precision(
    name: str, seed: int, tokenizer: PreTrainedTokenizerFast, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A token that rounding may send to another expert is sent to the same one in float32."""
    decoder, out = written(name, torch.bfloat16, tokenizer, tmp_path, seed)
    check_checkpoint(decoder, out, own_code=False)
    monkeypatch.setattr(check, "_check_tensors", lambda decoder, folder: None)
    decoder.layers[0].channel_output.weight.mul_(0.5)
    with pytest.raises(PruningError, match="logits differ"):
        check_checkpoint(decoder, out, own_code=False)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_float32_of_every_dtype(dtype: torch.dtype) -> None:
    """A model computes what its converted copy computes, and its weights stay as they are."""
    model, tokens = make_model("llama").to(dtype), torch.arange(24).view(2, 12)
    copy = make_model("llama").to(dtype).float()
    with torch.no_grad():
        expected = copy(tokens).logits
        with InFloat32():
            found = model(tokens).logits
    assert found.dtype == torch.float32 and torch.equal(found, expected)
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}


def test_functions_get_copies_of_tensors_in_lists() -> None:
    half = nn.Linear(3, 2, dtype=torch.bfloat16).weight
    with InFloat32():
        joined = torch.cat([half, torch.ones(1, 3)])
    assert joined.dtype == torch.float32 and torch.equal(joined[:2], half.float()) and half.dtype == torch.bfloat16
