"""What cannot be done is refused with a code and a sentence, and leaves nothing behind."""

import json
import shutil
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load_file, save_file
from transformers import PreTrainedTokenizerFast

from secateur.catalog.spec import Calibration, Evaluation, PruningSpec
from secateur.contract.errors import PruningError
from tests.engine.models import english, make_model, save
from tests.engine.running import prune

TEXT = english("evaluation")


def asked(**changes: Any) -> PruningSpec:
    plain = {
        "target_ratio": 0.3,
        "method": "magnitude",
        "calibration": Calibration(texts=TEXT, sequence_length=32),
        "evaluation": Evaluation(texts=TEXT, sequence_length=32, samples=4, latency=False, prompts=[]),
    }
    return PruningSpec(**{**plain, **changes})


@pytest.fixture(scope="module")
def source(tokenizer: PreTrainedTokenizerFast, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(make_model("llama"), tokenizer, tmp_path_factory.mktemp("bad") / "model")


def nan_weights(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"][3, 4] = torch.nan
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def truncate(folder: Path) -> None:
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[: len(data) // 2])


def garbage(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"not a tensor in sight" * 100)


def drop_tensor(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def no_weights(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def no_tokenizer(folder: Path) -> None:
    for file in folder.glob("tokenizer*"):
        file.unlink()


def broken_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.json").write_text("{}")


def edit(**changes: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, **changes}))

    return change


def deep_config(folder: Path) -> None:
    (folder / "config.json").write_text("[" * 200_000)


def odd_index(folder: Path) -> None:
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {"a": 5}}')


def broken_config(folder: Path) -> None:
    (folder / "config.json").write_text('{"model_type": ')


@pytest.mark.parametrize(
    ("spoil", "code", "says"),
    [
        (nan_weights, "weights_not_finite", "up_proj"),
        (truncate, "weights_corrupt", "model.safetensors"),
        (garbage, "weights_corrupt", "model.safetensors"),
        (drop_tensor, "weights_missing", "up_proj"),
        (no_weights, "weights_missing", "pickled"),
        (no_tokenizer, "tokenizer_missing", "tokenizer.json"),
        (broken_tokenizer, "tokenizer_missing", "tokenizer"),
        (broken_config, "config_invalid", "config.json"),
        (edit(model_type="mamba"), "unsupported_architecture", "glm4, gpt2, gpt_neox, llama, mistral"),
        (edit(num_attention_heads=5, head_dim=None), "config_invalid", "5 heads"),
        (edit(num_hidden_layers=10**9), "config_invalid", "from 1 to 1024"),
        (edit(vocab_size=10**12), "config_invalid", "vocab_size"),
        (edit(num_hidden_layers=2), "config_invalid", "layers.2"),
        (edit(hidden_act="nope"), "config_invalid", "nope"),
        (deep_config, "config_invalid", "nested"),
        (odd_index, "weights_corrupt", "no text"),
        (edit(num_key_value_heads=4), "config_invalid", "no multiple of 4"),
        (edit(intermediate_size=-1), "config_invalid", "intermediate_size"),
        (edit(intermediate_size=96), "config_invalid", "proj"),
        (edit(quantization_config={"quant_method": "gptq"}), "weights_quantized", "quantised"),
        (edit(per_layer_config={"0": {"intermediate_size": 64}}), "config_invalid", "keys '0' to"),
    ],
)
def test_bad_models(spoil: Callable[[Path], None], code: str, says: str, source: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(source, folder)
    spoil(folder)
    with pytest.raises(PruningError) as caught:
        prune(str(folder), asked(), tmp_path / "out")
    assert caught.value.code == code and says in caught.value.message
    assert not caught.value.retryable and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("model_id", "code"),
    [
        ("local:nothing-here", "model_not_found"),
        ("local:../../etc", "model_id_invalid"),
        ("local:", "model_id_invalid"),
        ("not a name", "model_id_invalid"),
        ("../models", "model_id_invalid"),
    ],
)
def test_bad_names(model_id: str, code: str, tmp_path: Path) -> None:
    with pytest.raises(PruningError) as caught:
        prune(model_id, asked(), tmp_path / "out", models_dir=tmp_path, allow_paths=False)
    assert caught.value.code == code and caught.value.field == "model_id"


def test_text_too_short(source: Path, tmp_path: Path) -> None:
    for part, short in (
        ("calibration", Calibration(texts=["few words here"], sequence_length=14)),
        ("evaluation", Evaluation(texts=["few words here"], sequence_length=14)),
    ):
        with pytest.raises(PruningError, match="one window needs 14") as caught:
            prune(str(source), asked(**{part: short}), tmp_path / "out")
        assert caught.value.code == f"{part}_too_short" and caught.value.field == part


def test_text_that_is_not_there(source: Path, tmp_path: Path) -> None:
    (tmp_path / "essays.txt").write_text("\n".join(TEXT))
    (tmp_path / "noise.bin").write_bytes(b"\xff\xfe\x00\xd8" * 100)
    for name, code in (
        ("local:essay.txt", "text_not_found"),
        ("local:noise.bin", "text_invalid"),
        ("local:../x", "text_not_found"),
    ):
        calibration = Calibration(dataset=name, sequence_length=32)
        with pytest.raises(PruningError) as caught:
            prune(str(source), asked(calibration=calibration), tmp_path / "out", texts_dir=tmp_path)
        assert caught.value.code == code
    with pytest.raises(PruningError, match=r"essays\.txt"):
        prune(
            str(source), asked(calibration=Calibration(dataset="local:essay.txt")), tmp_path / "out", texts_dir=tmp_path
        )
    calibration = Calibration(dataset="local:essays.txt", sequence_length=32)
    assert prune(str(source), asked(calibration=calibration), tmp_path / "out", texts_dir=tmp_path).folder.exists()


def test_full_disk(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(1000, 900, 100))
    with pytest.raises(PruningError, match="100 are free") as caught:
        prune(str(source), asked(), tmp_path / "out")
    assert caught.value.code == "disk_full" and caught.value.retryable


def test_ratio_that_cannot_be_met(source: Path, tmp_path: Path) -> None:
    with pytest.raises(PruningError, match="nearest") as caught:
        prune(str(source), asked(target_ratio=0.9), tmp_path / "out")
    assert caught.value.code == "ratio_unreachable" and caught.value.field == "target_ratio"
    with pytest.raises(PruningError, match="nearest") as caught:
        prune(str(source), asked(target_ratio=None, goal={"parameters": 127_000}), tmp_path / "out")
    assert caught.value.code == "ratio_unreachable" and caught.value.field == "goal"


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"target_ratio": 0}, "greater than 0"),
        ({"target_ratio": 0.91}, "less than or equal to 0.9"),
        ({"target_ratio": float("nan")}, "finite"),
        ({"method": "magic"}, "allowed: secateur, .*, magnitude, .*, dsgp, random"),
        ({"rounds": 0}, "greater than or equal to 1"),
        ({"rounds": True}, "valid integer"),
        ({"rounds": "2"}, "valid integer"),
        ({"target_ratio": "0.2"}, "valid number"),
        ({"speed": 1}, "Extra inputs"),
        ({"calibration": {"dataset": "wikitext2", "texts": ["both"]}}, "not both"),
        ({"calibration": {"texts": ["short"], "sequence_length": 64}}, "64"),
    ],
)
def test_bad_specs(changes: dict[str, Any], says: str) -> None:
    with pytest.raises(ValidationError, match=says):
        PruningSpec(**{"target_ratio": 0.2, "method": "piem", **changes})


def test_gradients_that_overflow(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    model = make_model("llama")
    with torch.no_grad():
        model.model.norm.weight.mul_(3e3)
        for layer in model.model.layers:
            layer.input_layernorm.weight.mul_(0.01)
            layer.post_attention_layernorm.weight.mul_(0.01)
        model.model.embed_tokens.weight.mul_(1e-3)
    folder = save(model, tokenizer, tmp_path / "model")
    with pytest.raises(PruningError) as caught:
        prune(str(folder), asked(method="piem-lsps", dtype="float16"), tmp_path / "out")
    assert caught.value.code == "loss_not_finite" and caught.value.field == "dtype"


def test_a_tokenizer_larger_than_the_model(source: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(source, folder)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    tokenizer.add_tokens(["river"])
    tokenizer.save_pretrained(folder)
    with pytest.raises(PruningError, match="384 embeddings") as caught:
        prune(str(folder), asked(calibration=Calibration(texts=["river " * 200], sequence_length=32)), tmp_path / "out")
    assert caught.value.code == "tokenizer_mismatch"


def test_output_that_is_there_already(source: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for taken in (tmp_path / "file", source):
        with pytest.raises(PruningError, match="already exists"):
            prune(str(source), asked(), taken)
