"""The call of the library: from a loaded model or a name to a saved model, with every kind of data, Ctrl-C, and what is refused."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file
from torch.utils.data import DataLoader
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from secateur import Paused, PruningError, Recipe, Result, prune
from secateur.contract.events import Event, ProgressEvent, StepEvent
from secateur.engine.run import static
from secateur.settings import get_settings
from tests import hub as fake_hub
from tests.engine.models import SIZES as TINY
from tests.engine.models import english, make_model, make_tokenizer, save, train
from tests.forked import checks_in_forks as checks_in_forks
from tests.forked import fork_server as fork_server

QUICK: dict[str, Any] = {
    "calibration": {"samples": 8, "sequence_length": 48},
    "evaluation": {"samples": 8, "sequence_length": 48, "latency": False, "prompts": []},
}
TEXTS = english("calibration")


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    torch.set_num_threads(1)
    return make_tokenizer()


@pytest.fixture(scope="session")
def folder(tokenizer: PreTrainedTokenizerFast, tmp_path_factory: pytest.TempPathFactory) -> Path:
    from transformers import LlamaConfig

    torch.manual_seed(0)
    model = train(LlamaForCausalLM(LlamaConfig(**TINY)), tokenizer, 20)
    return save(model, tokenizer, tmp_path_factory.mktemp("library") / "tiny")


@pytest.fixture
def model(folder: Path) -> LlamaForCausalLM:
    return LlamaForCausalLM.from_pretrained(folder)


@pytest.fixture
def unchecked(monkeypatch: pytest.MonkeyPatch) -> None:
    """A fresh process that loads the files costs seconds; one test here has it, and the export's tests."""
    monkeypatch.setattr(static, "check_checkpoint", lambda decoder, folder, own_code: None)


@pytest.fixture
def interruptible() -> Iterator[None]:
    """A shell lets a command that it starts in the background ignore SIGINT, and Python then leaves it so."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def call(model: Any, **arguments: Any) -> Any:
    given = {"data": TEXTS, "method": "magnitude", "ratio": 0.3, "recipe": QUICK, "progress": False, **arguments}
    return prune(model, **given)


def test_from_a_loaded_model_to_a_saved_one(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    before = sum(parameter.numel() for parameter in model.parameters())
    result = call(model, tokenizer=tokenizer, method="secateur")
    assert isinstance(result, Result) and result.model is model, "pruned in place"
    assert sum(parameter.numel() for parameter in model.parameters()) == result.report.parameters.after < before
    assert result.report.ratio.reached == pytest.approx(0.3, abs=0.05)
    assert [len(layer["channels"]) for layer in result.plan.layers] == [
        each.channels for each in result.report.widths.after
    ]
    inputs = result.tokenizer("The river", return_tensors="pt")
    assert result.model.generate(**inputs, max_new_tokens=4).shape[1] == inputs.input_ids.shape[1] + 4
    saved = result.save(tmp_path / "per-layer")
    padded = result.save(tmp_path / "padded", layout="padded")
    tokens = torch.arange(5, 40)[None]
    expected = model(tokens).logits
    stock = LlamaForCausalLM.from_pretrained(padded)
    assert torch.allclose(stock(tokens).logits, expected, atol=1e-4), "padding changes nothing"
    assert json.loads((saved / "secateur.json").read_text())["report"]["spec"]["layout"] == "per-layer"
    assert json.loads((padded / "secateur.json").read_text())["report"]["spec"]["layout"] == "padded"
    widths = {tuple(weight.shape) for name, weight in load_file(padded / "model.safetensors").items() if "gate" in name}
    assert len(widths) == 1
    assert sum(parameter.numel() for parameter in model.parameters()) == result.report.parameters.after, "as before"


@pytest.mark.usefixtures("unchecked")
def test_a_loaded_model_and_a_folder_give_the_same(
    model: LlamaForCausalLM, folder: Path, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    """Also where the unpruned model is needed once more, and for several ratios."""
    several: dict[str, dict[str, Any]] = {
        "one": {"method": "secateur", "rounds": 2},
        "distill": {"recipe": {**QUICK, "recovery": {"training": {"kind": "distill", "epochs": 1}}}},
    }
    for name, changes in several.items():
        loaded = LlamaForCausalLM.from_pretrained(folder)
        call(loaded, tokenizer=tokenizer, **changes).save(tmp_path / name / "loaded")
        call(str(folder), **changes).save(tmp_path / name / "named")
        one, other = (load_file(tmp_path / name / kind / "model.safetensors") for kind in ("loaded", "named"))
        assert one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)
    whole = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for ratio, result in zip([0.2, 0.5], call(model, tokenizer=tokenizer, ratio=[0.2, 0.5]), strict=True):
        result.save(tmp_path / f"{ratio}")
        call(folder, ratio=ratio).save(tmp_path / f"{ratio}-alone")
        one, other = (load_file(tmp_path / f"{ratio}{kind}" / "model.safetensors") for kind in ("", "-alone"))
        assert all(torch.equal(one[key], other[key]) for key in one)
    assert all(torch.equal(tensor, whole[name]) for name, tensor in model.state_dict().items()), "left as it is"


def test_several_ratios_are_one_model_at_a_time(folder: Path) -> None:
    results = call(folder, ratio=[0.2, 0.4])
    assert isinstance(results, Iterator)
    first = next(results)
    assert first.model is not None
    second = next(results)
    with pytest.raises(RuntimeError, match="released"):
        _ = first.model
    assert (first.report.ratio.target, second.report.ratio.target) == (0.2, 0.4)
    assert list(results) == []


def loader(rows: Any, **options: Any) -> DataLoader[Any]:
    return DataLoader(rows, **options)


DATA: dict[str, Callable[[Path, PreTrainedTokenizerFast], Any]] = {
    "texts": lambda folder, tokenizer: TEXTS,
    "path": lambda folder, tokenizer: folder / "text.txt",
    "path as text": lambda folder, tokenizer: str(folder / "text.txt"),
    "data set": lambda folder, tokenizer: Dataset.from_dict({"text": TEXTS}),
    "tensors": lambda folder, tokenizer: loader(list(windows(tokenizer)), batch_size=3),
    "mappings": lambda folder, tokenizer: [
        {"input_ids": windows(tokenizer)[:9]},
        {"input_ids": windows(tokenizer)[9:]},
    ],
}


def windows(tokenizer: PreTrainedTokenizerFast) -> torch.Tensor:
    ids = torch.tensor(tokenizer("\n\n".join(TEXTS)).input_ids)
    return ids[: len(ids) // 48 * 48].view(-1, 48)


@pytest.mark.parametrize("kind", DATA)
def test_data(kind: str, folder: Path, tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("\n\n".join(TEXTS))
    data = DATA[kind](tmp_path, tokenizer)
    if kind == "mappings":
        data = DataLoader(data, batch_size=None)
    report = call(folder, data=data, method="wanda").report
    same = call(folder, data=TEXTS, method="wanda").report
    if kind in ("tensors", "mappings"):
        assert report.calibration.source.endswith("windows of the caller") and report.calibration.windows == 8
        assert report.evaluation.source.startswith("held out of")
    else:
        assert report.perplexity == same.perplexity and report.widths == same.widths


def test_chats(model: LlamaForCausalLM, folder: Path) -> None:
    tokenizer = make_tokenizer()
    chats = [[{"role": "user", "content": text[:600]}, {"role": "assistant", "content": text[600:]}] for text in TEXTS]
    with pytest.raises(PruningError, match="chat template") as caught:
        call(model, tokenizer=tokenizer, data=chats)
    assert caught.value.field == "data"
    tokenizer.chat_template = "{% for message in messages %}<{{ message.role }}>{{ message.content }}{% endfor %}"
    templated = ["".join(f"<{message['role']}>{message['content']}" for message in chat) for chat in chats]
    found = call(model, tokenizer=tokenizer, data=Dataset.from_dict({"messages": chats}), method="wanda").report
    again = LlamaForCausalLM.from_pretrained(folder)
    expected = call(again, tokenizer=tokenizer, data=templated, method="wanda").report
    assert found.perplexity == expected.perplexity and found.widths == expected.widths


@pytest.mark.parametrize(
    "recipe", [{"calibration": {"dataset": "upload:x"}}, {"evaluation": {"perplexity": ["upload:x"]}}]
)
def test_uploads_are_of_a_service(recipe: dict[str, Any], folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("secateur.engine.run.run._load", lambda *arguments: pytest.fail("it is refused earlier"))
    with pytest.raises(PruningError, match="'upload:x' is a data set of a service") as caught:
        prune(folder, recipe=Recipe({"target_ratio": 0.2, "method": "magnitude", **recipe}), progress=False)
    assert caught.value.code == "text_not_found"
    assert (caught.value.field or "").split(".")[0] in recipe


def test_the_evaluation_text_is_the_callers(folder: Path) -> None:
    report = call(folder, evaluation=english("evaluation")).report
    assert report.evaluation.source.endswith("texts of the request")
    assert call(folder).report.evaluation.source.startswith("held out of")


def test_events(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    events: list[Event] = []
    call(folder, rounds=2, on_event=events.append)
    steps = [event.step for event in events if isinstance(event, StepEvent)]
    assert [(step.number, step.kind) for step in steps] == [(0, "baseline"), (1, "round"), (2, "round")]
    shares = [event.share for event in events if isinstance(event, ProgressEvent)]
    assert shares == sorted(shares)
    assert capsys.readouterr().out == ""


@pytest.mark.usefixtures("unchecked", "interruptible")
@pytest.mark.parametrize("method", ["magnitude", "secateur"])
def test_ctrl_c_keeps_what_is_done(method: str, folder: Path, tmp_path: Path) -> None:
    def interrupt(event: Event) -> None:
        if isinstance(event, StepEvent) and event.step.number == 2:
            signal.raise_signal(signal.SIGINT)

    asked = {"method": method, "rounds": 3}
    with pytest.raises(Paused) as caught:
        call(folder, **asked, on_event=interrupt)
    assert caught.value.step == 2 and str(caught.value.folder) in str(caught.value)
    done: list[int] = []

    def count(event: Event) -> None:
        if isinstance(event, StepEvent):
            done.append(event.step.number)

    with pytest.raises(PruningError) as refused:
        call(folder, **asked, resume=caught.value.folder, ratio=0.4)
    assert refused.value.code == "source_changed"
    resumed = call(folder, **asked, resume=caught.value.folder, on_event=count)
    assert done == [3]
    resumed.save(tmp_path / "resumed")
    call(folder, **asked).save(tmp_path / "straight")
    one, other = (load_file(tmp_path / kind / "model.safetensors") for kind in ("resumed", "straight"))
    assert all(torch.equal(one[key], other[key]) for key in one)


@pytest.mark.usefixtures("interruptible")
def test_ctrl_c_before_the_first_step_leaves_nothing(
    folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("secateur.library.tempfile.mkdtemp", lambda prefix: str(tmp_path / "run"))
    (tmp_path / "run").mkdir()

    def interrupt(event: Event) -> None:
        if isinstance(event, ProgressEvent):
            signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt) as caught:
        call(folder, on_event=interrupt)
    assert not isinstance(caught.value, Paused) and not (tmp_path / "run").exists()


def test_temporary_files_go_with_the_result(folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    result = call(folder)
    assert len(list(tmp_path.iterdir())) == 1
    del result
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(PruningError):
        call(folder, ratio=0.001)
    assert list(tmp_path.iterdir()) == []


WRONG: list[tuple[dict[str, Any], str, str]] = [
    ({"model": 7}, "model", "a Hub id"),
    ({"model": torch.nn.Linear(2, 2)}, "model", "transformers"),
    ({"tokenizer": "x"}, "tokenizer", "named model has its own"),
    ({"data": 7}, "data", "DataLoader"),
    ({"data": []}, "data", "empty list"),
    ({"data": Dataset.from_dict({"body": ["x"]})}, "data", "'text' or 'messages'"),
    ({"data": loader(list(torch.rand(4, 8)))}, "data", "token ids"),
    ({"ratio": "0.3"}, "target_ratio", "number"),
    ({"ratio": 2.0}, "target_ratio", "less than or equal to 0.9"),
    ({"ratio": None}, "goal", "either 'target_ratio' or 'goal'"),
    ({"ratio": None, "goal": {"bytes": 1}}, "goal", "can be pruned to"),
    ({"method": "owl"}, "method", "allowed: secateur"),
    ({"recipe": 7}, "recipe", "YAML or JSON"),
    ({"recipe": {"layut": "uniform"}}, "layut", "allowed: "),
    ({"resume": "/nowhere"}, "resume", "no run that can be resumed"),
]


@pytest.mark.parametrize(
    ("arguments", "field", "says"), WRONG, ids=[f"{at}-{case[1]}" for at, case in enumerate(WRONG)]
)
def test_what_is_refused_says_what_is_allowed(arguments: dict[str, Any], field: str, says: str, folder: Path) -> None:
    given = dict(arguments)
    with pytest.raises(PruningError) as caught:
        call(given.pop("model", folder), **given)
    assert caught.value.field == field and says in caught.value.message


def test_a_loaded_model_without_a_place_needs_its_tokenizer(model: LlamaForCausalLM) -> None:
    model.config.name_or_path = ""
    with pytest.raises(PruningError, match="tokenizer=") as caught:
        call(model)
    assert caught.value.code == "tokenizer_missing"


def test_what_cannot_be_saved_so(folder: Path, tmp_path: Path) -> None:
    result = call(folder, method="secateur")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    with pytest.raises(PruningError, match="not empty"):
        result.save(tmp_path / "full")
    with pytest.raises(PruningError, match="'per-layer', 'padded'"):
        result.save(tmp_path / "uniform", layout="uniform")
    with pytest.raises(PruningError, match="layout"):
        result.save(tmp_path / "none", layout="square")
    assert [path.name for path in tmp_path.iterdir()] == ["full"], "nothing half-done is left"


@pytest.mark.usefixtures("unchecked")
def test_push_to_hub(folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)
    with fake_hub.running() as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.url)
        get_settings.cache_clear()
        try:
            url = call(folder).push_to_hub("org/small", token=fake_hub.TOKEN)
        finally:
            get_settings.cache_clear()
        repository = hub.repositories["org/small"]
        assert repository.private and url == f"{hub.url}/org/small/tree/{repository.head.sha}"
        assert {"model.safetensors", "secateur.json", "README.md", "tokenizer.json"} <= repository.head.files.keys()
        assert json.loads(repository.head.files["secateur.json"])["repo_id"] == "org/small"


def test_a_dynamic_model(folder: Path, tmp_path: Path) -> None:
    result = call(folder, method="dsgp")
    saved = result.save(tmp_path / "dynamic")
    assert (saved / "modeling_dynamic.py").is_file()
    inputs = result.tokenizer("The river", return_tensors="pt")
    assert result.model.generate(**inputs, max_new_tokens=3).shape[1] == inputs.input_ids.shape[1] + 3


@pytest.mark.usefixtures("unchecked")
def test_families_with_fused_projections(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    for family in ("phi3", "glm", "gpt-neox", "mixtral"):
        model = make_model(family)
        result = call(model, tokenizer=tokenizer)
        assert result.model is model
        result.save(tmp_path / family)


def test_a_recipe_file_and_arguments_on_top_of_it(folder: Path, tmp_path: Path) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text(Recipe({**QUICK, "goal": {"parameters": 1}, "method": "wanda", "rounds": 2, "seed": 3}).dump())
    report = prune(folder, recipe=file, ratio=0.2, data=TEXTS, progress=False).report
    assert (report.components.scorer, report.rounds, report.seed) == ("wanda", 2, 3), "the recipe's"
    assert report.ratio.target == 0.2, "a ratio goes before the recipe's goal"


def test_torch_is_imported_when_pruning_begins() -> None:
    code = """
import sys
import secateur, secateur.client
from secateur import ErrorCode, PruningError, Recipe
assert not {"torch", "transformers"} & sys.modules.keys()
from secateur import prune
assert "torch" in sys.modules
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=os.environ)
    assert done.returncode == 0, done.stderr


def test_the_example_runs(folder: Path, tmp_path: Path) -> None:
    script = Path(__file__).parents[1] / "examples" / "prune_a_loaded_model.py"
    environment = os.environ | {"PYTHONPATH": str(script.parents[1]), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(script), str(folder), str(tmp_path / "saved")]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "saved and loaded again" in done.stdout and (tmp_path / "saved" / "model.safetensors").is_file()
