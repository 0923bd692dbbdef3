"""What reports say of a model beside its perplexity: other texts, zero-shot tasks, what it writes, latency, energy."""

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor

from secateur.catalog.sources import locate
from secateur.catalog.spec import Evaluation, PruningSpec
from secateur.contract.errors import PruningError
from secateur.engine.evaluation import latency
from secateur.engine.evaluation.energy import energy_meter
from secateur.engine.evaluation.generation import NEW_TOKENS, PROMPTS, generations
from secateur.engine.evaluation.latency import Protocol, measure_latency
from secateur.engine.evaluation.zero_shot import task_config, zero_shot
from secateur.engine.measure.texts import read_texts
from secateur.engine.model.decoder import Decoder
from secateur.engine.model.loading import load
from secateur.engine.run import measuring
from tests.engine.models import english
from tests.engine.test_prune import SHORT, run, spec

WORDS = ["river", "the old stone bridge", "a", "bread and salt", "winter", "of the", "seven"]
CHOICES: list[dict[str, Any]] = [
    {"query": f"The {word} was", "choices": [WORDS[at % 5], WORDS[(at + 2) % 7], "so"], "gold": at % 3}
    for at, word in enumerate(WORDS * 2)
]
PIQA = [{"goal": row["query"], "sol1": row["choices"][0], "sol2": row["choices"][1], "label": 1} for row in CHOICES]
SCHEMAS = [
    {"sentence": f"The {word} met the {WORDS[at]} so _ went home.", "option1": word, "option2": "it", "answer": "2"}
    for at, word in enumerate(WORDS)
]


@pytest.fixture(scope="module")
def decoder(trained_folder: Path) -> Decoder:
    return load(locate(str(trained_folder), allow_paths=True), "auto")


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tasks")
    contexts = [
        {
            "context_options": [row["sentence"].partition("_")[0] + row[option] for option in ("option1", "option2")],
            "continuation": "went home.",
            "gold": 1,
        }
        for row in SCHEMAS
    ]
    for name, rows in (("own", CHOICES), ("piqa", PIQA), ("winogrande", SCHEMAS), ("contexts", contexts)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@torch.no_grad()
def log_likelihood(decoder: Decoder, context: str, continuation: str) -> float:
    """Of the continuation's tokens after the context's, each from a forward pass of its own."""

    def ids(text: str) -> list[int]:
        return list(decoder.tokenizer(text, add_special_tokens=False)["input_ids"])

    begun = ids(context)
    total = 0.0
    for token in ids(context + continuation)[len(begun) :]:
        logits: Tensor = decoder.model(torch.tensor([begun])).logits[0, -1]
        total += float(logits.log_softmax(-1)[token])
        begun = [*begun, token]
    return total


def share_right(rows: list[tuple[list[tuple[str, str]], int]], decoder: Decoder, by_length: bool) -> float:
    """How often the right one of several (context, continuation) is the likeliest, by character where ``by_length``."""
    right = 0
    for pairs, gold in rows:
        sums = [log_likelihood(decoder, *pair) / (len(pair[1]) - 1 if by_length else 1) for pair in pairs]
        right += sums.index(max(sums)) == gold
    return right / len(rows)


def test_zero_shot_is_what_brute_force_gives(decoder: Decoder, tasks: Path) -> None:
    shares: list[float] = []
    found = zero_shot(decoder, ["own", "piqa", "winogrande", "contexts"], tasks, None, shares.append)
    own = [([(row["query"], f" {choice}") for choice in row["choices"]], row["gold"]) for row in CHOICES]
    piqa = [
        ([(f"Question: {row['goal']}\nAnswer:", f" {row[option]}") for option in ("sol1", "sol2")], 1) for row in PIQA
    ]
    contexts = [
        ([(row["sentence"].partition("_")[0] + row[option], " went home.") for option in ("option1", "option2")], 1)
        for row in SCHEMAS
    ]
    assert found["own"].value == pytest.approx(share_right(own, decoder, by_length=True))
    assert found["piqa"].value == pytest.approx(share_right(piqa, decoder, by_length=True))
    assert found["winogrande"].value == pytest.approx(share_right(contexts, decoder, by_length=False))
    assert found["contexts"].value == found["winogrande"].value
    assert {name: task.metric for name, task in found.items()} == {
        "own": "acc_norm", "piqa": "acc_norm", "winogrande": "acc", "contexts": "acc"
    }  # fmt: skip
    count, value = len(CHOICES), found["own"].value
    assert found["own"].stderr == pytest.approx(math.sqrt(value * (1 - value) / (count - 1)))
    assert (found["own"].examples, found["own"].source) == (count, "own.jsonl")
    assert len(shares) > 4 and shares == sorted(shares) and shares[-1] == 1.0


@pytest.mark.slow
def test_zero_shot_is_what_the_command_of_lm_eval_gives(
    decoder: Decoder, trained_folder: Path, tasks: Path, tmp_path: Path
) -> None:
    names = ["own", "piqa", "winogrande"]
    for name in names:
        config = task_config(name, tasks / f"{name}.jsonl", tmp_path / "cache")
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(config))
    command = [sys.executable, "-m", "lm_eval", "--model", "hf", "--model_args", f"pretrained={trained_folder}"]
    files = [str(tmp_path / f"{name}.yaml") for name in names]
    done = subprocess.run(
        [*command, "--tasks", ",".join(files), "--device", "cpu", "--limit", "10", "--output_path", tmp_path / "out"],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    (file,) = (tmp_path / "out").rglob("results*.json")
    theirs = json.loads(file.read_text())["results"]
    ours = zero_shot(decoder, names, tasks, 10, lambda share: None)
    for name in names:
        assert ours[name].value == theirs[name][f"{ours[name].metric},none"]
        assert ours[name].stderr == theirs[name][f"{ours[name].metric}_stderr,none"]


def test_a_limit_takes_the_first_examples(decoder: Decoder, tasks: Path, tmp_path: Path) -> None:
    (tmp_path / "own.jsonl").write_text("".join(json.dumps(row) + "\n" for row in CHOICES[:5]))
    limited = zero_shot(decoder, ["own"], tasks, 5, lambda share: None)
    whole = zero_shot(decoder, ["own"], tmp_path, None, lambda share: None)
    assert limited == whole and whole["own"].examples == 5


@pytest.mark.parametrize(
    ("name", "content", "code", "says"),
    [
        ("nowhere", None, "task_not_found", "boolq, piqa"),
        ("mine", "", "task_invalid", "JSON objects"),
        ("mine", "[1]\n", "task_invalid", "JSON objects"),
        ("mine", '{"text": "x"}\n', "task_invalid", "query, choices, gold"),
        ("piqa", '{"text": "x"}\n', "task_invalid", "piqa"),
    ],
)
def test_tasks_that_cannot_be_asked(
    name: str, content: str | None, code: str, says: str, decoder: Decoder, tmp_path: Path
) -> None:
    if content is not None:
        (tmp_path / f"{name}.jsonl").write_text(content)
    with pytest.raises(PruningError, match=says) as caught:
        zero_shot(decoder, [name], tmp_path, None, lambda share: None)
    assert (caught.value.code, caught.value.field) == (code, "evaluation.zero_shot")


def test_texts_are_read_whole_or_to_the_limit(decoder: Decoder, tmp_path: Path) -> None:
    text = "\n\n".join(english("evaluation"))
    (tmp_path / "book.txt").write_text(text)
    tokens = torch.tensor(decoder.tokenizer(text, add_special_tokens=False)["input_ids"])
    asked = Evaluation(perplexity=["local:book.txt"], perplexity_length=32)
    [windows] = read_texts(decoder, asked, tmp_path, None).values()
    assert torch.equal(windows.flatten(), tokens[: len(tokens) // 32 * 32])
    [limited] = read_texts(decoder, asked.model_copy(update={"limit": 3}), tmp_path, None).values()
    assert torch.equal(limited, windows[:3])


def test_generations_take_the_likeliest_token_each_time(decoder: Decoder) -> None:
    prompts = [PROMPTS[0], "x" * 500]
    for prompt, written in zip(prompts, generations(decoder, prompts), strict=True):
        tokens = decoder.tokenizer(prompt)["input_ids"][-(decoder.shape.max_positions - NEW_TOKENS) :]
        begun = len(tokens)
        while len(tokens) < begun + NEW_TOKENS:
            tokens = [*tokens, int(decoder.model(torch.tensor([tokens])).logits[0, -1].argmax())]
            if tokens[-1] == decoder.tokenizer.eos_token_id:
                break
        assert written == decoder.tokenizer.decode(tokens[begun:], skip_special_tokens=True)


def test_latency_times_what_its_protocol_says(decoder: Decoder) -> None:
    shapes: list[tuple[int, ...]] = []
    hook = decoder.model.register_forward_pre_hook(lambda module, inputs: shapes.append(tuple(inputs[0].shape)))
    found = measure_latency(
        decoder, Protocol(decode_batch=8, decode_tokens=20, decode_prompt=1, repeats=2, prefill_tokens=64)
    )
    hook.remove()
    assert shapes == ([(1, 64)] + [(8, 1)] * 21) * 3, "the first of three warms up"
    assert found.tokens_per_second == pytest.approx(8000 / found.decode_ms_per_token)
    assert (found.batch_size, found.decode_tokens, found.repeats) == (8, 20, 2)
    assert (latency.SLIMLLM.decode_batch, latency.SLIMLLM.decode_tokens, latency.SLIMLLM.repeats) == (8, 256, 20)


def test_energy_is_the_sum_of_packages_that_wrap_around(tmp_path: Path) -> None:
    cpu = torch.device("cpu")
    assert energy_meter(cpu, tmp_path) is None

    def counts(first: int, second: int) -> None:
        for name, value in (("intel-rapl:0", first), ("intel-rapl:1", second), ("intel-rapl:0:0", 7)):
            (tmp_path / name).mkdir(exist_ok=True)
            (tmp_path / name / "energy_uj").write_text(f"{value}\n")
            (tmp_path / name / "max_energy_range_uj").write_text("9999999\n")

    counts(9_000_000, 1_000_000)
    meter = energy_meter(cpu, tmp_path)
    assert meter is not None and meter() == 0
    counts(9_500_000, 3_000_000)
    assert meter() == pytest.approx(2.5)
    counts(500_000, 3_000_000)
    assert meter() == pytest.approx(3.5), "the first one began anew"


def test_a_report_has_all_of_it_for_both_models(
    trained_folder: Path, tasks: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "book.txt").write_text("\n\n".join(english("evaluation")))
    evaluation = {
        **SHORT, "latency": False, "perplexity": ["local:book.txt"], "perplexity_length": 32, "zero_shot": ["own"],
        "limit": 6, "prompts": ["The river"],
    }  # fmt: skip
    asked = spec(method="random", target_ratio=0.5, rounds=2, evaluation=evaluation)
    events: list[dict[str, Any]] = []
    report = run(
        trained_folder, tmp_path / "out", asked, texts_dir=tmp_path, tasks_dir=tasks, on_event=events.append
    ).report
    pair, task = report["benchmarks"]["perplexity"]["local:book.txt"], report["benchmarks"]["zero_shot"]["own"]
    assert pair["before"] < pair["after"] and task["examples"] == 6
    mean = report["benchmarks"]["zero_shot_mean"]
    assert mean == {"before": task["before"], "after": task["after"]}
    assert report["retained_accuracy"] == (mean["after"] / mean["before"] if mean["before"] else None)
    assert report["generations"][0]["prompt"] == "The river"
    widths = report["widths"]
    units = [sum(layer["kv_groups"] + layer["channels"] for layer in widths[when]) for when in widths]
    assert report["redundancy_removed"] == pytest.approx(1 - units[1] / units[0])
    rounds = [event for event in events if event["type"] == "step"]
    assert ["benchmarks" in event["data"] for event in rounds] == [True, False, True], "the first model and the last"
    card = (tmp_path / "out" / "README.md").read_text()
    assert "perplexity, local:book.txt" in card and "own (acc_norm, 6 examples)" in card

    def never(*_: object) -> None:
        raise AssertionError("the unpruned model is not measured again")

    monkeypatch.setattr(measuring.Measurer, "measure", never)
    again = run(
        trained_folder, tmp_path / "again", asked, texts_dir=tmp_path, tasks_dir=tasks, resume=rounds[2]["state"]
    ).report
    assert again["benchmarks"] == report["benchmarks"] and again["generations"] == report["generations"]


def test_tasks_are_named_once() -> None:
    with pytest.raises(ValueError, match="twice"):
        PruningSpec(target_ratio=0.2, method="random", evaluation={"zero_shot": ["piqa", "piqa"]})
