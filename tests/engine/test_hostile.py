"""Model files that are made to hold a process up: each is refused with a code and a sentence, before anything is built."""

import json
import os
import re
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Regex, Tokenizer, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from secateur.catalog import sources
from secateur.catalog.architectures import shape_from_config
from secateur.catalog.sources import locate
from secateur.catalog.spec import Calibration, Evaluation, PruningSpec
from secateur.contract.errors import ErrorCode, PruningError
from secateur.engine import time_limit
from secateur.engine.model import generic
from secateur.engine.model.loading import download, load
from tests.engine.models import SIZES, make_model, save
from tests.engine.running import prune

LLAMA = "llama"
UNADAPTED = "stablelm"


@pytest.fixture(scope="module")
def folders(tokenizer: PreTrainedTokenizerFast, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A sound model of a family with an adapter, and of one without."""
    parent = tmp_path_factory.mktemp("hostile")
    return {name: save(make_model(name), tokenizer, parent / name) for name in (LLAMA, UNADAPTED)}


def refused(folder: Path, gguf_file: str | None = None) -> PruningError:
    with pytest.raises(PruningError) as caught:
        locate(str(folder), gguf_file=gguf_file, allow_paths=True)
    assert not caught.value.retryable and len(caught.value.message) < 1000
    return caught.value


HUGE = 10**4000
BAD_NUMBERS: list[Any] = [True, -1, 0.5, "12", HUGE, -HUGE, [], {}, float("nan"), float("inf"), 1e300, 2**63]


@pytest.mark.parametrize("family", [LLAMA, UNADAPTED])
@pytest.mark.parametrize(
    "key", ["hidden_size", "num_hidden_layers", "intermediate_size", "num_attention_heads", "vocab_size"]
)
def test_sizes_of_every_wrong_kind(family: str, key: str, folders: dict[str, Path], tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(folders[family], folder)
    config = json.loads((folder / "config.json").read_text())
    for value in [*BAD_NUMBERS, None]:
        (folder / "config.json").write_text(json.dumps({**config, key: value}))
        error = refused(folder)
        assert error.code in ("config_invalid", "unsupported_architecture") and key in error.message, value


@pytest.mark.parametrize("family", [LLAMA, UNADAPTED])
@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"num_hidden_layers": 300_000}, "num_hidden_layers"),
        ({"n_mtp_layers": 300_000}, "n_mtp_layers"),
        ({"num_experts_per_tok": HUGE}, "num_experts_per_tok"),
        ({"text_config": {"hidden_size": -5}}, "text_config.hidden_size"),
        ({"inner": [{"num_things": float("nan")}]}, "inner.num_things"),
        ({"rope_theta": float("nan")}, "rope_theta"),
        ({"rope_theta": HUGE}, "rope_theta"),
        ({"rope_scaling": 5}, "rope_scaling"),
        ({"rope_parameters": {"full_attention": "x"}}, "rope_parameters.full_attention"),
        ({"rope_parameters": {"partial_rotary_factor": "x"}}, "rope_parameters.partial_rotary_factor"),
        ({"rope_parameters": {"rope_type": ["default"]}}, "rope_parameters.rope_type"),
        ({"architectures": 5}, "architectures"),
        ({"architectures": {"a": "b"}}, "architectures"),
        ({"hidden_act": {}}, "hidden_act"),
        ({"model_type": ["llama"]}, "model_type"),
        ({"labels": list(range(300_000))}, "too many values"),
    ],
)
def test_values_of_a_config(
    family: str, changes: dict[str, Any], key: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(folders[family], folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))
    error = refused(folder)
    assert error.code == "config_invalid" and key in error.message and error.field == "model_id"


@pytest.mark.parametrize("family", [LLAMA, UNADAPTED])
@pytest.mark.parametrize("changes", [{"num_hidden_layers": 1000}, {"intermediate_size": 2**20}, {"vocab_size": 2**24}])
def test_a_config_that_declares_more_than_the_files_hold(
    family: str, changes: dict[str, int], folders: dict[str, Path], tmp_path: Path
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(folders[family], folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))
    with pytest.raises(PruningError, match=r"declares [0-9,]+ layers and [0-9,]+ parameters") as caught:
        download(locate(str(folder), allow_paths=True), None, None, lambda *_: None)
    assert caught.value.code == "config_invalid" and not caught.value.retryable


def test_a_model_that_grows_while_it_is_built(monkeypatch: pytest.MonkeyPatch) -> None:
    """A key that no bound knows may still multiply the modules."""
    monkeypatch.setattr(generic, "MOST_MODULES", 5000)
    config = {**SIZES, "model_type": "stablelm", "num_hidden_layers": 300_000}
    with pytest.raises(PruningError, match="more than 5,000 modules"):
        generic._build(config)


def test_planning_takes_as_long_for_odd_sizes() -> None:
    """A thousand layers of a thousand heads and a million channels: the widest model that passes the bounds."""
    sizes = {"hidden_size": 1024, "num_attention_heads": 1024, "intermediate_size": 2**20, "num_hidden_layers": 64}
    shape = shape_from_config({"model_type": "llama", "vocab_size": 8, **sizes})
    assert 0.2 < shape.nearest_ratio(0.3, 1, uniform=True) < 0.4


def deep(path: Path) -> None:
    path.write_text('{"a":' * 200 + "1" + "}" * 200)


def arrays(path: Path) -> None:
    path.write_text("[" * 100_000)


def directory(path: Path) -> None:
    path.mkdir()


def pipe(path: Path) -> None:
    os.mkfifo(path)


def digits(path: Path) -> None:
    path.write_text('{"weight_map": ' + "9" * 10_000 + "}")


def large(path: Path) -> None:
    with path.open("wb") as file:
        file.truncate(2**40)


@pytest.mark.parametrize("spoil", [deep, arrays, directory, pipe, digits, large])
@pytest.mark.parametrize(
    ("name", "codes"),
    [
        ("config.json", {"config_invalid"}),
        ("model.safetensors.index.json", {"weights_corrupt"}),
        ("model.safetensors", {"weights_corrupt", "weights_missing"}),
        ("tokenizer.json", {"tokenizer_missing", "tokenizer_unusable"}),
        ("tokenizer_config.json", {"tokenizer_unusable"}),
        ("generation_config.json", {"config_invalid"}),
    ],
)
def test_files_of_every_wrong_kind(
    spoil: Callable[[Path], None], name: str, codes: set[str], folders: dict[str, Path], tmp_path: Path
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(folders[LLAMA], folder)
    (folder / name).unlink(missing_ok=True)
    spoil(folder / name)
    with pytest.raises(PruningError) as caught:  # the worker alone reads tokenizer.json
        load(locate(str(folder), allow_paths=True), "auto")
    assert caught.value.code in codes and not caught.value.retryable


@pytest.mark.parametrize("value", [[], {}, {"weight_map": []}, {"weight_map": [[]]}, {"weight_map": {"a": ["b"]}}, "x"])
def test_an_index_that_is_none(value: Any, folders: dict[str, Path], tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(folders[LLAMA], folder)
    (folder / "model.safetensors.index.json").write_text(json.dumps(value))
    assert refused(folder).code == "weights_corrupt"


def test_an_index_of_too_many_shards(folders: dict[str, Path], tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(folders[LLAMA], folder)
    shards = {f"t{number}": f"{number}.safetensors" for number in range(sources.MOST_SHARDS + 1)}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": shards}))
    assert "4,097 files" in refused(folder).message


def test_a_safetensors_header_that_is_too_large(folders: dict[str, Path], tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(folders[LLAMA], folder)
    with (folder / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", 90_000_000) + b"{")
        file.truncate(2**30)
    error = refused(folder)
    assert error.code == "weights_corrupt" and "header" in error.message


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value)) + value.encode()


def gguf(keys: bytes = b"", key_count: int = 0, tensors: bytes = b"", tensor_count: int = 0, version: int = 3) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", version, tensor_count, key_count) + keys + tensors


def key(name: str, kind: int, value: bytes) -> bytes:
    return text(name) + struct.pack("<I", kind) + value


def tensor(name: str, dimensions: list[int], kind: int = 0, offset: int = 0) -> bytes:
    return text(name) + struct.pack(f"<I{len(dimensions)}QIQ", len(dimensions), *dimensions, kind, offset)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "ends within"),
        (b"GGML" + bytes(100), "begin with"),
        (gguf(version=9), "version is 9"),
        (gguf(key_count=2**60), "metadata keys"),
        (gguf(tensor_count=2**60), "tensors"),
        (gguf(key_count=1), "ends within"),
        (gguf(tensor_count=1), "ends within"),
        (gguf(struct.pack("<Q", 2**50), 1), "bytes; allowed"),
        (gguf(key("a", 8, struct.pack("<Q", 2**50)), 1), "bytes; allowed"),
        (gguf(key("a", 9, struct.pack("<IQ", 0, 2**50)), 1) + bytes(5_000_000), "elements"),
        (gguf(key("a", 9, struct.pack("<IQ", 8, 2**50)), 1) + bytes(5_000_000), "elements"),
        (gguf(key("a", 9, struct.pack("<IQ", 8, 2**20)), 1), "ends within"),
        (gguf(key("a", 9, struct.pack("<IQ", 8, 1) + struct.pack("<Q", 2**62)), 1), "ends within"),
        (gguf(key("a", 9, struct.pack("<IQ", 10, 2**20)), 1), "ends within"),
        (gguf(key("a", 9, struct.pack("<IQ", 9, 1) + struct.pack("<IQ", 9, 1) * 1000), 1), "kind 9"),
        (gguf(key("a", 99, b""), 1), "unknown kind"),
        (gguf(key("a", 0, b"a") * 2, 2), "twice"),
        (gguf(b"\xff" * 0 + struct.pack("<Q", 1) + b"\xff" + struct.pack("<IB", 0, 0), 1), "decode"),
        (gguf(tensors=tensor("t", [1] * 5), tensor_count=1), "dimensions"),
        (gguf(tensors=tensor("t", [2**50]), tensor_count=1), "ends behind"),
        (gguf(tensors=tensor("t", [2**63, 2**63]), tensor_count=1), "ends behind"),
        (gguf(tensors=tensor("t", [4], offset=2**60), tensor_count=1), "ends behind"),
        (gguf(tensors=tensor("t", [4], kind=999), tensor_count=1), "999"),
        (gguf(tensors=tensor("t", [0]) * 2, tensor_count=2), "twice"),
        (gguf(), "general.architecture"),
        (gguf(key("general.architecture", 4, struct.pack("<I", 1)), 1), "no text"),
    ],
)
def test_gguf_headers(content: bytes, says: str, tmp_path: Path) -> None:
    (tmp_path / "m.gguf").write_bytes(content)
    error = refused(tmp_path, "m.gguf")
    assert error.code == "weights_corrupt" and says in error.message and error.field == "gguf_file"


@pytest.mark.parametrize(
    ("kind", "value"),
    [(6, struct.pack("<f", float("inf"))), (8, text("4")), (7, b"\1"), (10, struct.pack("<Q", 2**63))],
)
def test_gguf_sizes(kind: int, value: bytes, tmp_path: Path) -> None:
    keys = key("general.architecture", 8, text("llama")) + key("llama.embedding_length", kind, value)
    (tmp_path / "m.gguf").write_bytes(gguf(keys, 2))
    error = refused(tmp_path, "m.gguf")
    assert error.code == "config_invalid" and "hidden_size" in error.message


def test_a_gguf_file_that_is_none(tmp_path: Path) -> None:
    (tmp_path / "m.gguf").mkdir()
    with pytest.raises(PruningError):
        locate(str(tmp_path), allow_paths=True)


HANGING = r".*.*\d{9}"
"""Oniguruma gives up a match after ten million steps; this pattern takes fewer, at every character anew."""
FAILING = r"(a+)+$"
LINE = "the river rose " * 60 + "\n"
"""A line on which a tokenizer with the pattern ``HANGING`` works for a second or more, and not for much longer: the thread of
a tokenizer that was given up goes on after its test."""


def spoiled(tokenizer: PreTrainedTokenizerFast, pattern: str, part: str) -> PreTrainedTokenizerFast:
    own = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    if part == "pre_tokenizer":
        own.pre_tokenizer = pre_tokenizers.Split(Regex(pattern), "isolated")
    else:
        own.normalizer = normalizers.Replace(Regex(pattern), "x")
    return PreTrainedTokenizerFast(tokenizer_object=own)


@pytest.mark.parametrize("part", ["pre_tokenizer", "normalizer"])
@pytest.mark.parametrize(
    ("pattern", "says"), [(HANGING, "did not finish within"), (FAILING, "retry-limit-in-match over")]
)
def test_a_tokenizer_that_backtracks(
    part: str, pattern: str, says: str, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(time_limit, "TOKENIZER_SECONDS", 0.2 if pattern == HANGING else 600)
    monkeypatch.setattr(time_limit, "CHARACTERS_PER_SECOND", 10**9)
    long = LINE if pattern == HANGING else "a" * 60 + "!"
    with pytest.raises(PruningError, match=re.escape(says)) as caught:
        time_limit.encode(spoiled(tokenizer, pattern, part), long)
    assert caught.value.code == ErrorCode.TOKENIZER_UNUSABLE and not caught.value.retryable


def test_a_run_with_a_tokenizer_that_backtracks(
    folders: dict[str, Path], tokenizer: PreTrainedTokenizerFast, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run ends with the reason, wherever the text comes from; the supervisor of a job reports the same error."""
    monkeypatch.setattr(time_limit, "TOKENIZER_SECONDS", 5.0)
    folder = tmp_path / "model"
    shutil.copytree(folders[LLAMA], folder)
    spoiled(tokenizer, HANGING, "pre_tokenizer").save_pretrained(folder)
    spec = PruningSpec(
        target_ratio=0.3,
        method="magnitude",
        calibration=Calibration(texts=[LINE * 10], sequence_length=32),
        evaluation=Evaluation(samples=4, sequence_length=32, latency=False),
    )
    with pytest.raises(PruningError, match="tokenizer did not finish") as caught:
        prune(str(folder), spec, tmp_path / "out")
    assert caught.value.code == "tokenizer_unusable" and not (tmp_path / "out").exists()


def test_a_tokenizer_file_that_is_too_large(
    folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sources, "LARGEST_TOKENIZER", 100)
    error = refused(folders[LLAMA])
    assert error.code == "tokenizer_unusable" and "allowed: 100" in error.message
