"""Models from a Hub, from a GGUF file; texts from a data set: the ways in that are not a local folder."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import gguf
import numpy
import pytest
import torch
from huggingface_hub import constants
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from secateur.catalog.sources import locate, read_shape
from secateur.catalog.spec import Calibration, Evaluation, PruningSpec
from secateur.contract.errors import PruningError
from secateur.engine.model.loading import load
from tests import hub as fake_hub
from tests.engine.models import VOCABULARY, english, make_model, save
from tests.engine.running import prune

ASKED = PruningSpec(
    target_ratio=0.3,
    method="magnitude",
    calibration=Calibration(texts=english("calibration"), sequence_length=32),
    evaluation=Evaluation(texts=english("evaluation"), sequence_length=32, samples=4, latency=False, prompts=[]),
)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[fake_hub.FakeHub]:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    with fake_hub.running() as running:
        yield running


def files_of(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def test_from_the_hub(hub: fake_hub.FakeHub, tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    first, second = (save(make_model("llama", seed), tokenizer, tmp_path / f"source-{seed}") for seed in (0, 1))
    repository = hub.create("org/model", files=files_of(first))
    pinned = repository.head.sha
    reach: dict[str, Any] = {"token": fake_hub.TOKEN, "endpoint": hub.url, "allow_paths": False}
    events: list[dict[str, Any]] = []
    straight = prune("org/model", ASKED, tmp_path / "a", on_event=events.append, **reach).report
    assert straight["source"]["revision"] == pinned and straight["source"]["fingerprint"] == f"commit:{pinned}"
    repository.add("retrained", files_of(second))

    state = next(event["state"] for event in events if event["type"] == "step")
    resumed = prune("org/model", ASKED, tmp_path / "b", resume=state, **reach).report
    assert resumed["source"]["revision"] == pinned and resumed["perplexity"] == straight["perplexity"]
    anew = prune("org/model", ASKED, tmp_path / "c", **reach).report
    assert anew["source"]["revision"] == repository.head.sha and anew["perplexity"] != straight["perplexity"]
    old = prune("org/model", ASKED, tmp_path / "d", revision=pinned, **reach).report
    assert old["perplexity"] == straight["perplexity"]
    assert "base_model: org/model" in (tmp_path / "a" / "README.md").read_text()


def test_what_the_hub_says_no_to(hub: fake_hub.FakeHub, tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    files = files_of(save(make_model("llama"), tokenizer, tmp_path / "source"))
    reach: dict[str, Any] = {"token": fake_hub.TOKEN, "endpoint": hub.url}
    hub.create(
        "org/pickled",
        files={**{name: files[name] for name in files if name != "model.safetensors"}, "pytorch_model.bin": b""},
    )
    hub.create("org/mute", files={name: files[name] for name in files if not name.startswith("tokenizer")})
    hub.create("org/odd", files={**files, "config.json": b"[]"})
    hub.create("org/torn", files={**files, "model.safetensors": files["model.safetensors"][:5000]})
    cases: list[tuple[str, dict[str, Any], str]] = [
        ("org/absent", {}, "model_not_found"),
        ("org/pickled", {}, "weights_missing"),
        ("org/mute", {}, "tokenizer_missing"),
        ("org/odd", {}, "config_invalid"),
        ("org/torn", {}, "weights_corrupt"),
        ("org/torn", {"revision": "nothing"}, "revision_not_found"),
        ("org/torn", {"gguf_file": "no.gguf"}, "model_not_found"),
    ]
    for model_id, options, code in cases:
        with pytest.raises(PruningError) as caught:
            prune(model_id, ASKED, tmp_path / "out", **options, **reach)
        assert caught.value.code == code and not caught.value.retryable, model_id
    hub.broken = True
    with pytest.raises(PruningError) as caught:
        prune("org/model", ASKED, tmp_path / "out", **reach)
    assert caught.value.code == "hub_unavailable" and caught.value.retryable


def write_gguf(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, path: Path) -> None:
    """A Llama as llama.cpp's converter lays it out: q and k rows interleaved for its rotary embedding."""
    config, writer = model.config, gguf.GGUFWriter(path, "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    words = sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list([word for word, _ in words])
    writer.add_token_types([3 if word == "<|end|>" else 1 for word, _ in words])
    merges = json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]
    writer.add_token_merges([" ".join(pair) for pair in merges])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(0)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for name, tensor in model.state_dict().items():
        data = tensor.float().numpy()
        for part, heads in (("q_proj", config.num_attention_heads), ("k_proj", config.num_key_value_heads)):
            if part in name:
                data = data.reshape(heads, 2, -1, data.shape[1]).swapaxes(1, 2).reshape(data.shape)
        writer.add_tensor(str(names.get_name(name, (".weight",))), numpy.ascontiguousarray(data))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_from_a_gguf_file(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    model = make_model("llama", num_key_value_heads=6)
    (tmp_path / "models" / "tiny").mkdir(parents=True)
    write_gguf(model, tokenizer, tmp_path / "models" / "tiny" / "tiny.gguf")
    source = locate("local:tiny", models_dir=tmp_path / "models")
    assert source.gguf_file == "tiny.gguf"
    assert read_shape(source).parameters == sum(parameter.numel() for parameter in model.parameters())
    decoder = load(source, "auto")
    tokens = torch.randint(VOCABULARY, (2, 16), generator=torch.Generator().manual_seed(0))
    assert torch.allclose(decoder.model(tokens).logits, model(tokens).logits, atol=1e-4)
    result = prune("local:tiny", ASKED, tmp_path / "out", models_dir=tmp_path / "models")
    assert result.report["dtype"] == "float32" and result.report["source"]["gguf_file"] == "tiny.gguf"
    assert prune(str(tmp_path / "models" / "tiny" / "tiny.gguf"), ASKED, tmp_path / "by-path").folder.is_dir()


@pytest.mark.parametrize("named", ["bfloat16", None])
def test_admission_and_the_engine_agree_on_auto(
    named: str | None, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    folder = save(make_model("llama").bfloat16(), tokenizer, tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    assert config.pop("dtype") == "bfloat16"
    (folder / "config.json").write_text(json.dumps(config | ({} if named is None else {"dtype": named})))
    source = locate(str(folder), allow_paths=True)
    assert source.dtype == (named or "float32")
    assert load(source, "auto").model.dtype == getattr(torch, source.dtype)


def test_a_torn_gguf_file(tmp_path: Path) -> None:
    (tmp_path / "m.gguf").write_bytes(b"GGUF" + b"\x03" * 40)
    with pytest.raises(PruningError) as caught:
        locate(str(tmp_path / "m.gguf"), allow_paths=True)
    assert caught.value.code == "weights_corrupt" and caught.value.field == "gguf_file"


def test_named_data_sets(trained_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The Hub's data sets, with the fetching itself replaced."""
    asked: list[tuple[Any, ...]] = []
    rows = {"train": english("calibration"), "test": english("evaluation")}

    def load_dataset(
        path: str, config: str | None, split: str, streaming: bool, token: str | None, revision: str | None
    ) -> list[dict[str, str]]:
        asked.append((path, config, split))
        if path == "org/absent":
            raise datasets.exceptions.DatasetNotFoundError("no such data set")
        return [{"text": text} for text in rows[split]]

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)

    def run(name: str) -> dict[str, Any]:
        calibration = Calibration(dataset=name, samples=4, sequence_length=32)
        evaluation = Evaluation(dataset=name, samples=4, sequence_length=32, latency=False)
        spec = PruningSpec(target_ratio=0.3, method="piem", calibration=calibration, evaluation=evaluation)
        return prune(str(trained_folder), spec, tmp_path / name.replace("/", "-")).report

    report = run("wikitext2")
    assert asked == [("Salesforce/wikitext", "wikitext-2-raw-v1", split) for split in ("train", "test")]
    assert report["calibration"]["source"] == report["evaluation"]["source"] == "wikitext2"
    run("org/texts:small")
    assert asked[2:] == [("org/texts", "small", split) for split in ("train", "test")]
    with pytest.raises(PruningError) as caught:
        run("org/absent")
    assert caught.value.code == "text_not_found" and caught.value.field == "calibration.dataset"


@pytest.mark.parametrize(
    "asked",
    [
        {"calibration": Calibration(dataset="org/data", sequence_length=32)},
        {"evaluation": Evaluation(dataset="org/data", sequence_length=32)},
        {"evaluation": ASKED.evaluation.model_copy(update={"perplexity": ["wikitext2"]})},
        {"evaluation": ASKED.evaluation.model_copy(update={"zero_shot": ["piqa"]})},
    ],
)
def test_every_library_talks_to_the_hub_of_the_settings(
    hub: fake_hub.FakeHub, tokenizer: PreTrainedTokenizerFast, tmp_path: Path, asked: dict[str, Any]
) -> None:
    """``datasets`` would go to the public Hub, and take the token along."""
    source = save(make_model("llama"), tokenizer, tmp_path / "source")
    before = datasets.config.HF_ENDPOINT, constants.ENDPOINT
    reach: dict[str, Any] = {"token": fake_hub.TOKEN, "endpoint": hub.url}
    with pytest.raises(PruningError):  # this Hub has no data sets
        prune(str(source), ASKED.model_copy(update=asked), tmp_path / "out", **reach)
    assert [path for path in hub.asked if path.startswith(("/api/datasets/", "/datasets/"))], hub.asked
    assert before == (datasets.config.HF_ENDPOINT, constants.ENDPOINT)
