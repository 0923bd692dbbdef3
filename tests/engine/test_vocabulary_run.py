"""Runs that cut the vocabulary: from the request to the files, the report and a resumed run."""

import inspect
import json
from html.entities import html5
from pathlib import Path
from typing import Any

import pytest
import torch
from gguf import GGUFReader
from pydantic import TypeAdapter, ValidationError
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from secateur.catalog.architectures import shape_from_config
from secateur.catalog.resolve import resolve
from secateur.catalog.sources import locate
from secateur.catalog.spec import PruningSpec
from secateur.contract.errors import ErrorCode, PruningError
from secateur.engine.export import gguf
from secateur.engine.model.loading import load
from secateur.engine.model.plan import Plan, PlanData
from secateur.engine.structures.vocabulary import choose, cut_decoder, named_tokens
from tests.engine.models import english
from tests.engine.running import Pruned, prune

TEXTS = english("calibration")
SETTINGS: dict[str, Any] = {
    "method": "secateur",
    "vocabulary": {"max_growth": 0.2, "multiple": 16},
    "calibration": {"texts": TEXTS, "samples": 8, "sequence_length": 64},
    "evaluation": {"samples": 8, "sequence_length": 64, "latency": False, "prompts": ["The river"]},
}
ANY_TEXT = ["The river rose.", "Café 日本 👍🏽\n\n\t<|end|>", " ".join(html5.values()), inspect.getsource(json)]


def spec(**changes: Any) -> PruningSpec:
    return PruningSpec(**{**SETTINGS, **changes})


@pytest.fixture(scope="module")
def alone(trained_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Pruned:
    return prune(str(trained_folder), spec(), tmp_path_factory.mktemp("alone") / "result", allow_paths=True)


def kept(result: Pruned) -> list[int]:
    manifest = json.loads((result.folder / "secateur.json").read_text())
    plan = Plan.from_data(TypeAdapter(PlanData).validate_python(manifest["plan"]))
    return list(plan.model["vocabulary"])


def test_vocabulary_alone(trained_folder: Path, alone: Pruned) -> None:
    report, ids = alone.report, kept(alone)
    assert not list(alone.folder.glob("*.py")), "the stock class holds the model"
    model = AutoModelForCausalLM.from_pretrained(alone.folder)
    source = AutoModelForCausalLM.from_pretrained(trained_folder)
    assert type(model) is type(source)
    vocabulary = report["vocabulary"]
    assert vocabulary["before"] == source.config.vocab_size > vocabulary["after"] == model.config.vocab_size == len(ids)
    assert 0 <= vocabulary["growth"] <= 0.2
    assert vocabulary["bytes_after"] / vocabulary["bytes_before"] == len(ids) / source.config.vocab_size
    assert report["ratio"]["reached"] == 0
    before, after = report["nats_per_byte"]["before"], report["nats_per_byte"]["after"]
    assert 0 < before < after, "the little model has never seen a common word in pieces"
    tokens = torch.tensor([list(range(len(ids)))[:40]])
    with torch.no_grad():
        expected = source(torch.tensor(ids)[tokens]).logits[..., ids]
        torch.testing.assert_close(model(tokens).logits, expected)
    card = (alone.folder / "README.md").read_text()
    assert f"with {len(ids):,} tokens" in card and "nats per byte" in card
    assert "trust_remote_code" not in card


def test_every_text_is_still_written_and_read(trained_folder: Path, alone: Pruned) -> None:
    source, cut = (AutoTokenizer.from_pretrained(folder) for folder in (trained_folder, alone.folder))
    for text in ANY_TEXT:
        decoded = [each.decode(each(text)["input_ids"], clean_up_tokenization_spaces=False) for each in (source, cut)]
        assert decoded == [text, text]
        assert max(cut(text)["input_ids"]) < alone.report["vocabulary"]["after"]


@pytest.mark.parametrize("layout", ["per-layer", "padded"])
def test_with_everything_else_and_resumed(layout: str, trained_folder: Path, tmp_path: Path) -> None:
    states: list[Any] = []
    training = {"kind": "distill", "epochs": 0.5, "batch_size": 4}
    asked = spec(target_ratio=0.2, rounds=2, layout=layout, recovery={"training": training})
    whole = prune(
        str(trained_folder),
        asked,
        tmp_path / "whole",
        allow_paths=True,
        scratch=tmp_path,
        on_event=lambda event: states.append(event["state"]) if "state" in event else None,
    )
    assert whole.report["ratio"]["reached"] == pytest.approx(0.2, abs=0.05)
    assert whole.report["vocabulary"]["after"] == len(kept(whole)) < whole.report["vocabulary"]["before"]
    model = AutoModelForCausalLM.from_pretrained(whole.folder, trust_remote_code=layout == "per-layer")
    assert model.config.vocab_size == len(kept(whole))
    source = states[0]
    assert source["vocabulary"]["growth"] == whole.report["vocabulary"]["growth"]
    resumed = prune(str(trained_folder), asked, tmp_path / "resumed", allow_paths=True, scratch=tmp_path, resume=source)
    assert kept(resumed) == kept(whole)
    for name, tensor in load_file(whole.folder / "model.safetensors").items():
        assert torch.equal(tensor, load_file(resumed.folder / "model.safetensors")[name]), name
    assert resumed.report["nats_per_byte"] == whole.report["nats_per_byte"]
    assert resumed.report["perplexity"] == whole.report["perplexity"]


def test_a_goal_counts_the_tokens_first_and_units_make_up_the_rest(
    trained_folder: Path, alone: Pruned, tmp_path: Path
) -> None:
    before, without_tokens = (alone.report["parameters"][when] for when in ("before", "after"))
    loose = {"parameters": (before + without_tokens) // 2}
    result = prune(str(trained_folder), spec(goal=loose, rounds=3), tmp_path / "loose", allow_paths=True)
    assert kept(result) == kept(alone)
    assert (result.report["parameters"]["after"], result.report["ratio"]["reached"]) == (without_tokens, 0)
    assert [step["kind"] for step in result.report["steps"]] == ["round"], "nothing is left for rounds"

    near = {"parameters": without_tokens - 100}
    training = {"training": {"kind": "lora", "epochs": 0.5, "batch_size": 4}}
    asked = spec(goal=near, rounds=3, recovery=training)
    result = prune(str(trained_folder), asked, tmp_path / "near", allow_paths=True)
    assert (result.report["parameters"]["after"], result.report["ratio"]["reached"]) == (without_tokens, 0)
    assert [step["kind"] for step in result.report["steps"]][-1] == "training"

    tight = {"bytes": 4 * 0.9 * without_tokens}
    result = prune(str(trained_folder), spec(goal=tight), tmp_path / "tight", allow_paths=True)
    assert kept(result) == kept(alone)
    assert result.report["parameters"]["after"] == pytest.approx(0.9 * without_tokens, rel=0.02)
    assert 0 < result.report["ratio"]["reached"] < 0.9


def test_a_goal_with_vocabulary_at_the_door(trained_folder: Path) -> None:
    config = json.loads((trained_folder / "config.json").read_text())
    shape = shape_from_config(config)
    units, tokens = round(0.9 * shape.prunable_parameters), shape.vocabulary_parameters
    for goal in (shape.parameters - 1, shape.parameters - units - tokens + 1):
        found = resolve(spec(goal={"parameters": goal}), shape, config=config, source_dtype="float32")
        assert not found.decided and 0 < found.ratios[0] <= 0.9
        assert found.nearest_ratio(shape, 0) is None
    asked = spec(goal={"parameters": shape.parameters - 1}, structures=["experts"], method="reap")
    with pytest.raises(PruningError, match="has no 'experts'") as raised:
        resolve(asked, shape, config=config, source_dtype="float32")
    assert (raised.value.code, raised.value.field) == (ErrorCode.STRUCTURE_UNSUPPORTED, "structures")
    for goal in (shape.parameters, shape.parameters - units - tokens - 2):
        with pytest.raises(PruningError, match="can be pruned to") as raised:
            resolve(spec(goal={"parameters": goal}), shape, config=config, source_dtype="float32")
        assert (raised.value.code, raised.value.field) == (ErrorCode.GOAL_UNREACHABLE, "goal")


def test_texts_of_its_own(trained_folder: Path, tmp_path: Path) -> None:
    own = {"max_growth": 0.0, "multiple": 1, "texts": ["the river " * 50]}
    without = {"samples": 4, "sequence_length": 32}
    result = prune(
        str(trained_folder), spec(vocabulary=own, calibration=without), tmp_path / "result", allow_paths=True
    )
    assert result.report["vocabulary"]["growth"] == 0
    assert "sha256" in result.report["spec"]["vocabulary"]["texts"], "texts may be confidential"


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"vocabulary": {"max_growth": -0.1}}, "vocabulary.max_growth"),
        ({"vocabulary": {"max_growth": 1.5}}, "vocabulary.max_growth"),
        ({"vocabulary": {"multiple": 0}}, "vocabulary.multiple"),
        ({"vocabulary": {"tokens": 3}}, "vocabulary.tokens"),
        ({"vocabulary": {"texts": ["a"], "dataset": "c4"}}, "vocabulary"),
        ({"calibration": {}}, "calibration"),
        ({"method": "dsgp", "target_ratio": 0.2}, "method"),
        ({"rounds": 3}, "rounds"),
        ({"vocabulary": None}, "goal"),
    ],
)
def test_bad_settings(changes: dict[str, Any], field: str) -> None:
    with pytest.raises(ValidationError) as raised:
        spec(**changes)
    assert [".".join(map(str, error["loc"])) for error in raised.value.errors()] == [field]


def test_uploads_are_named() -> None:
    assert spec(vocabulary={"dataset": "upload:7"}).uploads() == {"vocabulary.dataset": "7"}


def test_token_ids_of_the_caller_are_refused(trained_folder: Path, tmp_path: Path) -> None:
    from secateur.engine.run.run import NamedModel, open_run
    from secateur.engine.run.workspace import Listener, Workspace

    opened = open_run(
        NamedModel(str(trained_folder)),
        spec(),
        Workspace(allow_paths=True),
        Listener(),
        tokens=torch.zeros(4, 16, dtype=torch.long),
        scratch_beside=tmp_path,
    )
    with pytest.raises(PruningError, match="renumbers") as raised, opened:
        pass
    assert (raised.value.code, raised.value.field) == (ErrorCode.INVALID_REQUEST, "data")


def test_inspect_names_the_vocabularys_share(trained_folder: Path) -> None:
    shape = shape_from_config(json.loads((trained_folder / "config.json").read_text()))
    model = AutoModelForCausalLM.from_pretrained(trained_folder)
    tables = {id(each.weight): each.weight.numel() for each in (model.get_input_embeddings(), model.lm_head)}
    assert shape.as_dict()["vocabulary_share"] == sum(tables.values()) / shape.parameters


def test_gguf_file_has_the_cut_tokenizer(trained_folder: Path, tmp_path: Path) -> None:
    source = locate(str(trained_folder), allow_paths=True)
    decoder = load(source, "float32")
    choice = choose(decoder.tokenizer, TEXTS, decoder.shape.vocab_size, named_tokens(decoder.model), 0.2, 16)
    cut_decoder(decoder, choice.vocabulary)
    gguf.write_gguf(decoder, source, tmp_path / "model.gguf", "F32")
    reader = GGUFReader(tmp_path / "model.gguf")
    size = choice.vocabulary.size
    words = reader.fields["tokenizer.ggml.tokens"].contents()
    assert words == decoder.tokenizer.convert_ids_to_tokens(list(range(size)))
    for merge in reader.fields["tokenizer.ggml.merges"].contents():
        assert set(merge.split(" ")) | {merge.replace(" ", "")} <= set(words)
    assert reader.fields["llama.vocab_size"].contents() == size
    tables = {tensor.name: tuple(tensor.shape) for tensor in reader.tensors}
    assert tables["token_embd.weight"][1] == size
    end = reader.fields["tokenizer.ggml.eos_token_id"].contents()
    assert words[end] == decoder.tokenizer.eos_token
