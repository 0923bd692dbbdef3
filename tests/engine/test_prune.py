"""The whole engine on a small trained model: every method, rounds, resume, determinism, sources of text."""

import json
import shutil
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load_file
from transformers import LlamaForCausalLM

from secateur.catalog.methods import METHODS, STATIC_METHODS
from secateur.catalog.resolve import components
from secateur.catalog.sources import locate
from secateur.catalog.spec import Allocation, Calibration, Evaluation, PruningSpec, Scoring
from secateur.contract.errors import PruningError
from secateur.contract.report import Latency, Spread
from secateur.engine.evaluation import latency, suite
from secateur.engine.export import check_checkpoint, checkpoint
from secateur.engine.model import loading
from secateur.engine.model.decoder import Decoder
from secateur.engine.model.loading import load
from secateur.engine.run import progress, static
from secateur.engine.run import run as running
from secateur.engine.run.state import RunState
from secateur.engine.run.workspace import Paused
from secateur.engine.scoring import base, llm_pruner, piem
from tests.engine.models import english, make_tokenizer, save
from tests.engine.running import Pruned, prune
from tests.tiers import slow_but

UNIT = 32 * 3 * 48
"""Parameters of one block of channels of the trained model."""


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Loading a checkpoint in a fresh process is the export's test, and so is the picture; here they would only cost time."""
    monkeypatch.setattr(static, "check_checkpoint", lambda decoder, folder, own_code: None)
    monkeypatch.setattr(checkpoint, "draw_widths", lambda widths, file: file.touch())


def spec(**changes: Any) -> PruningSpec:
    plain = {
        "target_ratio": 0.3,
        "method": "piem-lsps",
        "rounds": 2,
        "calibration": Calibration(texts=english("calibration"), samples=16, sequence_length=64),
        "evaluation": Evaluation(
            texts=english("evaluation"), samples=16, sequence_length=64, latency=False, prompts=[]
        ),
    }
    return PruningSpec(**{**plain, **changes})


RECOVERED = {"layerwise": {"kind": "least-squares"}}
SHORT = {"texts": english("calibration"), "samples": 6, "sequence_length": 32}


def run(folder: Path, out: Path, asked: PruningSpec, **options: Any) -> Pruned:
    return prune(str(folder), asked, out, **options)


@pytest.mark.parametrize("method", STATIC_METHODS)
@pytest.mark.parametrize(("ratio", "rounds"), slow_but([(0.5, 3)], [(0.1, 1), (0.5, 3)]))
def test_every_method_meets_its_target(
    method: str, ratio: float, rounds: int, trained_folder: Path, tmp_path: Path
) -> None:
    report = run(trained_folder, tmp_path / "out", spec(method=method, target_ratio=ratio, rounds=rounds)).report
    parameters = report["parameters"]
    removed = parameters["prunable_before"] - parameters["prunable_after"]
    assert abs(removed - ratio * parameters["prunable_before"]) <= UNIT / 2 + 1
    assert report["ratio"]["reached"] == pytest.approx(removed / parameters["prunable_before"])
    weights = load_file(tmp_path / "out" / "model.safetensors")
    biases = sum(tensor.numel() for name, tensor in weights.items() if name.endswith("_proj.bias"))
    assert biases == (3 * 2 * 48 if METHODS[method].layerwise_recovery in ("bias", "linear-regression") else 0)
    assert parameters["before"] - parameters["after"] == removed - biases
    assert len(report["steps"]) == rounds
    assert report["perplexity"]["after"] > report["perplexity"]["before"] > 1 or ratio < 0.5
    assert sum(tensor.numel() for tensor in weights.values()) == parameters["after"]
    for layer in report["widths"]["after"]:
        gate = weights[f"model.layers.{layer['layer']}.mlp.gate_proj.weight"]
        query = weights[f"model.layers.{layer['layer']}.self_attn.q_proj.weight"]
        assert gate.shape == (layer["channels"], 48) and query.shape == (layer["heads"] * 8, 48)


def test_scores_beat_chance(trained_folder: Path, tmp_path: Path) -> None:
    after = {
        method: run(trained_folder, tmp_path / method, spec(method=method, rounds=1)).report["perplexity"]["after"]
        for method in ("piem-lsps", "random")
    }
    assert after["piem-lsps"] < after["random"]


@pytest.mark.parametrize("ratio", [0.02, 0.85])
def test_extreme_targets(ratio: float, trained_folder: Path, tmp_path: Path) -> None:
    report = run(trained_folder, tmp_path / "out", spec(target_ratio=ratio, allocation={"width_multiple": 8})).report
    assert abs(report["ratio"]["reached"] - ratio) <= 8 * 3 * 48 / report["parameters"]["prunable_before"]


def timeless(rounds: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """All but how long they took."""
    return [{name: value for name, value in data.items() if name != "seconds"} for data in rounds]


def test_resume_goes_on_as_if_nothing_had_happened(trained_folder: Path, tmp_path: Path) -> None:
    asked = spec(rounds=3)
    events: list[dict[str, Any]] = []
    straight = run(trained_folder, tmp_path / "straight", asked, on_event=events.append).report
    rounds = [event for event in events if event["type"] == "step"]
    assert [event["number"] for event in rounds] == [0, 1, 2, 3]
    for event in rounds:
        again: list[dict[str, Any]] = []
        out = tmp_path / f"resumed-{event['number']}"
        report = run(trained_folder, out, asked, on_event=again.append, resume=event["state"]).report
        assert [e["number"] for e in again if e["type"] == "step"] == list(range(event["number"] + 1, 4))
        assert report["widths"] == straight["widths"] and report["perplexity"] == straight["perplexity"]
        assert report["steps"][: event["number"]] == straight["steps"][: event["number"]]
        assert timeless(report["steps"]) == timeless(straight["steps"])
        assert all(data["seconds"] > 0 for data in report["steps"])
        weights, expected = (load_file(folder / "model.safetensors") for folder in (out, tmp_path / "straight"))
        assert all(torch.equal(weights[name], expected[name]) for name in expected)


@pytest.mark.parametrize("recovery", slow_but([RECOVERED], [{}, RECOVERED]), ids=["plain", "recovered"])
def test_a_middle_step_of_a_run_is_a_run_of_its_own(
    recovery: dict[str, Any], trained_folder: Path, tmp_path: Path
) -> None:
    """It has the widths and the perplexity that the step had, scores nothing again, and measures what the step did not."""
    scratch, kept = tmp_path / "scratch", tmp_path / "kept"
    scratch.mkdir()
    kept.mkdir()
    events: list[dict[str, Any]] = []

    def on_event(event: dict[str, Any]) -> None:
        events.append(event)
        for path in scratch.glob("step-*"):
            shutil.copy(path, kept)

    asked = spec(rounds=3, target_ratio=[0.2, 0.4], recovery=recovery)
    run(trained_folder, tmp_path / "whole", asked, scratch=scratch, on_event=on_event)
    of_round = {event["number"]: event for event in events if event["type"] == "step"}
    assert set(of_round) == set(range(7))
    for number, rounds in ((1, 1), (5, 2)):
        step = of_round[number]["data"]
        ending = spec(rounds=rounds, target_ratio=step["ratio"]["reached"], recovery=recovery)
        state = RunState.load(of_round[number]["state"]).ending_here(ending).as_dict()
        again: list[dict[str, Any]] = []
        out = tmp_path / f"step-{number}"
        own = shutil.copytree(kept, tmp_path / f"scratch-{number}")
        report = run(trained_folder, out, ending, scratch=own, resume=state, on_event=again.append).report
        assert {event["stage"] for event in again if event["type"] == "progress"}.isdisjoint({"scoring", "training"})
        assert report["widths"]["after"] == step["widths"]
        assert report["perplexity"]["after"] == pytest.approx(step["perplexity"], rel=1e-6)
        assert report["ratio"]["reached"] == pytest.approx(step["ratio"]["reached"]) and report["rounds"] == rounds
        assert [each["number"] for each in report["steps"]] == list(range(number - rounds + 1, number + 1))
        last = [event["state"] for event in again if event["type"] == "step"][-1]
        assert RunState.load(last).ending_here(ending).as_dict() == last, "a later attempt resumes from its own state"


def test_a_step_is_of_no_other_request(trained_folder: Path, tmp_path: Path) -> None:
    states: list[dict[str, Any]] = []
    run(trained_folder, tmp_path / "out", spec(rounds=2), on_event=states.append)
    state = next(event["state"] for event in states if event.get("number") == 1)
    others: list[dict[str, Any]] = [
        {"rounds": 2},
        {"seed": 1},
        {"method": "magnitude"},
        {"recovery": {"training": {"kind": "lora"}}},
    ]
    for changes in others:
        with pytest.raises(PruningError) as caught:
            RunState.load(state).ending_here(spec(**{"rounds": 1, "target_ratio": 0.1, **changes}))
        assert caught.value.code == "source_changed"


def test_pause_after_a_round(trained_folder: Path, tmp_path: Path) -> None:
    events: list[dict[str, Any]] = []
    with pytest.raises(Paused):
        run(
            trained_folder,
            tmp_path / "out",
            spec(rounds=3),
            on_event=events.append,
            stop=lambda: any(event.get("number") == 1 for event in events),
        )
    assert [event["number"] for event in events if event["type"] == "step"] == [0, 1]
    assert not (tmp_path / "out").exists()


def test_pause_within_training(trained_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "scratch").mkdir()
    asked = spec(**{"calibration": SHORT, **STEPWISE["distill"]})
    events: list[dict[str, Any]] = []
    options: dict[str, Any] = {"scratch": tmp_path / "scratch", "on_event": events.append}
    with pytest.raises(Paused):
        run(trained_folder, tmp_path / "out", asked, **options, stop=lambda: events[-1].get("number") == 2)
    last = events[-1]
    assert last["type"] == "step" and last["data"]["training"]["step"] < last["data"]["training"]["steps"]
    rounds = run(trained_folder, tmp_path / "out", asked, **options, resume=last["state"]).report["steps"]
    assert rounds[-1]["seconds"] > last["state"]["targets"][0]["training"]["seconds"] > 0


def same_weights(*folders: Path) -> bool:
    first, *others = (load_file(folder / "model.safetensors") for folder in folders)
    return all(
        other.keys() == first.keys() and all(torch.equal(other[name], first[name]) for name in first)
        for other in others
    )


NEITHER = [name for name, method in METHODS.items() if not method.dynamic and not method.needs_gradients]


@pytest.mark.parametrize("method", slow_but(["secateur", "piem-lsps"], [*NEITHER, "piem-lsps"]))
def test_same_seed_same_plan_on_one_thread_and_two(method: str, trained_folder: Path, tmp_path: Path) -> None:
    plans = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        try:
            run(trained_folder, tmp_path / str(threads), spec(method=method, calibration=SHORT))
        finally:
            torch.set_num_threads(1)
        plans.append(json.loads((tmp_path / str(threads) / "secateur.json").read_text())["plan"])
    assert plans[0] == plans[1]
    one, two = (load_file(tmp_path / threads / "model.safetensors") for threads in "12")
    tolerance = {"rtol": 0, "atol": 0} if METHODS[method].layerwise_recovery == "none" else {"rtol": 1e-3, "atol": 1e-4}
    assert all(torch.allclose(one[name], two[name], **tolerance) for name in one)


TRAINED = {"epochs": 4.0, "batch_size": 1, "rank": 2}
"""On 6 windows: 24 steps, so that there is a checkpoint before the end."""
STEPWISE: dict[str, dict[str, Any]] = {
    "least-squares": {"method": "secateur", "rounds": 2, "target_ratio": [0.2, 0.5]},
    "linear-regression": {"method": "slimllm", "rounds": 2},
    "bias": {"method": "flap", "rounds": 2},
    "lora": {"method": "magnitude", "rounds": 2, "recovery": {"training": {"kind": "lora", **TRAINED}}},
    "linear-regression and lora": {
        "method": "slimllm",
        "rounds": 2,
        "recovery": {"training": {"kind": "lora", **TRAINED}},
    },
    "distill": {"method": "magnitude", "rounds": 1, "recovery": {"training": {"kind": "distill", **TRAINED}}},
}


@pytest.mark.parametrize("kind", slow_but(["bias", "linear-regression and lora"], STEPWISE))
def test_resume_after_every_state_with_a_recovery(kind: str, trained_folder: Path, tmp_path: Path) -> None:
    """Through JSON and the scratch folder alone, to the same bits; and without the folder's file, not at all.

    With the scratch folder as it was when the next state was told: until that one is safe, this one must do.
    """
    asked = spec(**{"calibration": SHORT, **STEPWISE[kind]})
    chosen = components(asked)
    assert " and ".join(filter(None, (chosen.layerwise.name, chosen.names.training))).removeprefix("none and ") == kind
    scratch, states = tmp_path / "scratch", []
    scratch.mkdir()

    def on_event(event: dict[str, Any]) -> None:
        if event["type"] == "step":
            shutil.copytree(scratch, tmp_path / f"scratch-{event['number'] - 1}")
            states.append(event)

    straight = run(trained_folder, tmp_path / "straight", asked, scratch=scratch, on_event=on_event).report
    scratch.rename(tmp_path / f"scratch-{len(states) - 1}")
    steps = {"least-squares": 4, "distill": 3}.get(kind, 4 if chosen.training else 2)
    stretches = 1 if chosen.training else 0  # before the one that ends the training
    assert chosen.steps == steps - stretches
    assert [event["number"] for event in states] == list(range(steps + 1))
    for event in states:
        out, state = tmp_path / f"resumed-{event['number']}", json.loads(json.dumps(event["state"]))
        kept = tmp_path / f"scratch-{event['number']}"
        report = run(trained_folder, out, asked, scratch=kept, resume=state).report
        most = chosen.targets + 1 + bool(chosen.training and chosen.recovers_layerwise)
        assert len(list(kept.glob("step-*"))) <= most, "one a target and one of its training, and one that was replaced"
        for one, other in zip(report.get("targets", [report]), straight.get("targets", [straight]), strict=True):
            assert one["perplexity"] == other["perplexity"] and timeless(one["steps"]) == timeless(other["steps"])
        for folder in {file.parent.relative_to(out) for file in out.rglob("model.safetensors")}:
            assert same_weights(out / folder, tmp_path / "straight" / folder)
    with pytest.raises(PruningError) as caught:
        run(trained_folder, tmp_path / "lost", asked, scratch=tmp_path, resume=states[-1]["state"])
    assert caught.value.code == "checkpoint_damaged"


@pytest.mark.parametrize(
    "changes",
    slow_but(
        [{"method": "secateur"}], [{"method": "piem-lsps"}, {"method": "secateur"}, {"method": "slimllm", "rounds": 1}]
    ),
)
def test_several_targets_are_as_many_jobs(changes: dict[str, Any], trained_folder: Path, tmp_path: Path) -> None:
    ratios = [0.2, 0.35, 0.5]
    report = run(trained_folder, tmp_path / "all", spec(**changes, target_ratio=ratios)).report
    assert [target["ratio"]["target"] for target in report["targets"]] == ratios
    assert [path.name for path in tmp_path.iterdir()] == ["all"], "nothing is left beside it"
    assert {path.name for path in (tmp_path / "all").iterdir()} == {"ratio-0.2", "ratio-0.35", "ratio-0.5"}
    for ratio, target in zip(ratios, report["targets"], strict=True):
        alone = run(trained_folder, tmp_path / f"{ratio}", spec(**changes, target_ratio=ratio)).report
        assert same_weights(tmp_path / f"{ratio}", tmp_path / "all" / f"ratio-{ratio}")
        assert target["perplexity"] == alone["perplexity"] and target["widths"] == alone["widths"]


def test_several_targets_have_one_model_in_memory_at_a_time(
    trained_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded: list[weakref.ref[Decoder]] = []

    def load(*args: Any, **named: Any) -> Decoder:
        assert not any(known() for known in loaded), "another model is still in memory"
        decoder = loading.load(*args, **named)
        loaded.append(weakref.ref(decoder))
        return decoder

    monkeypatch.setattr(running, "load", load)
    run(trained_folder, tmp_path / "out", spec(method="magnitude", rounds=1, target_ratio=[0.2, 0.35, 0.5]))
    assert len(loaded) == 3


@pytest.mark.parametrize(
    "changes",
    [
        {"method": "secateur", "rounds": 3},
        {"method": "magnitude", "recovery": {"training": {"kind": "distill", **TRAINED}}},
    ],
)
def test_the_unpruned_model_is_loaded_again_once_and_gone_when_memory_is_measured(
    changes: dict[str, Any], trained_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded: list[weakref.ref[Decoder]] = []
    alive: list[int] = []

    def load(*args: Any, **named: Any) -> Decoder:
        decoder = loading.load(*args, **named)
        loaded.append(weakref.ref(decoder))
        return decoder

    def measure_latency(decoder: Decoder, protocol: latency.Protocol) -> Latency:
        alive.append(sum(known() is not None for known in loaded))
        return latency.measure_latency(decoder, protocol)

    monkeypatch.setattr(running, "load", load)
    monkeypatch.setattr(suite, "measure_latency", measure_latency)
    asked = spec(**changes, calibration=SHORT, evaluation={**SHORT, "latency": True})
    run(trained_folder, tmp_path / "out", asked)
    assert len(loaded) == 2 and alive and set(alive) == {1}


def test_times_of_a_busy_machine_are_called_so(
    trained_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spreads = iter([(10.0, 16.0), (10.0, 12.0)])

    def measure_latency(decoder: Decoder, protocol: latency.Protocol) -> Latency:
        found = latency.measure_latency(decoder, protocol)
        spread = Spread(prefill_ms=next(spreads), decode_ms_per_token=(5.0, 6.0))
        return found.model_copy(update={"spread": spread})

    monkeypatch.setattr(suite, "measure_latency", measure_latency)
    asked = spec(method="magnitude", rounds=1, calibration=SHORT, evaluation={**SHORT, "latency": True})
    events: list[dict[str, Any]] = []
    run(trained_folder, tmp_path / "out", asked, on_event=events.append)
    warned = [event["message"] for event in events if event["type"] == "warning" and "latency" in event["message"]]
    assert len(warned) == 1 and "busy" in warned[0], "of the first, not of the second"
    assert "the machine was busy" in (tmp_path / "out" / "README.md").read_text()


@pytest.mark.parametrize("method", slow_but(["piem-lsps"], ["piem-lsps", "flap", "slimllm", "secateur", "llm-pruner"]))
def test_statistics_that_are_kept_are_not_taken_again(
    method: str, trained_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked, folder = spec(method=method, rounds=1), tmp_path / "statistics"
    run(trained_folder, tmp_path / "plain", asked)
    first = run(trained_folder, tmp_path / "first", asked, statistics_dir=folder).report
    assert list(folder.glob("*.safetensors")) and same_weights(tmp_path / "plain", tmp_path / "first")

    def taken(*args: Any) -> Any:
        raise AssertionError("taken again")

    with monkeypatch.context() as patch:
        patch.setattr(base, "gate_statistics", taken)
        patch.setattr(base, "forward_statistics", taken)
        patch.setattr(piem, "shielded_loss_change", taken)
        patch.setattr(llm_pruner, "gradients_from_the_end", taken)
        second = run(trained_folder, tmp_path / "second", asked, statistics_dir=folder).report
        assert second["steps"][0].get("shielding") == first["steps"][0].get("shielding")
        weighed = spec(method=method, rounds=1, scoring=Scoring(gamma=0.0))
        run(trained_folder, tmp_path / "weighed", weighed, statistics_dir=folder)
        run(trained_folder, tmp_path / "other", spec(method=method, rounds=1, target_ratio=0.5), statistics_dir=folder)
        assert same_weights(tmp_path / "plain", tmp_path / "second")
        with pytest.raises(AssertionError, match="taken again"):  # of other tokens nothing is known
            run(trained_folder, tmp_path / "changed", spec(method=method, calibration=SHORT), statistics_dir=folder)
    run(trained_folder, tmp_path / "other-plain", spec(method=method, rounds=1, target_ratio=0.5))
    assert same_weights(tmp_path / "other", tmp_path / "other-plain")
    for file in folder.glob("*.safetensors"):
        file.write_bytes(file.read_bytes()[:50])
    run(trained_folder, tmp_path / "damaged", asked, statistics_dir=folder)
    assert same_weights(tmp_path / "plain", tmp_path / "damaged")


def test_another_method_takes_the_statistics_that_it_shares(
    trained_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A second run with another method and ratio takes the statistics of the first, as a derived job does."""
    folder = tmp_path / "statistics"
    run(trained_folder, tmp_path / "first", spec(method="flap", rounds=1), statistics_dir=folder)
    [kept] = folder.glob("*-forward_statistics.safetensors")

    def taken(*args: Any) -> Any:
        raise AssertionError("taken again")

    monkeypatch.setattr(base, "forward_statistics", taken)
    other = {"method": "magnitude", "rounds": 1, "target_ratio": 0.4, "allocation": Allocation(kind="cosine")}
    run(trained_folder, tmp_path / "other", spec(**other), statistics_dir=folder)
    assert [kept] == list(folder.glob("*-forward_statistics.safetensors"))
    with pytest.raises(AssertionError, match="taken again"):  # for another seed nothing is known
        run(trained_folder, tmp_path / "seeded", spec(**other, seed=9), statistics_dir=folder)


@pytest.mark.parametrize("method", ["magnitude", "random"])
def test_scores_that_cost_no_pass_are_not_kept(method: str, trained_folder: Path, tmp_path: Path) -> None:
    run(trained_folder, tmp_path / "out", spec(method=method), statistics_dir=tmp_path / "statistics")
    assert not (tmp_path / "statistics").exists()


MIXED: list[dict[str, Any]] = [
    {"method": "piem-lsps", "recovery": {"layerwise": {"kind": "least-squares"}}},
    {"method": "piem", "recovery": {"layerwise": {"kind": "bias"}}, "allocation": {"kind": "cosine"}},
    {"method": "flap", "recovery": {"layerwise": {"kind": "least-squares", "fit_to": "layer"}}},
    {"method": "slimllm", "recovery": {"layerwise": {"kind": "none"}}, "allocation": {"kind": "lsps"}},
    {
        "method": "llm-pruner",
        "allocation": {"kind": "inner"},
        "recovery": {"layerwise": {"kind": "linear-regression"}},
    },
    {"method": "magnitude", "scoring": {"kind": "obs"}, "allocation": {"kind": "cosine"}},
    {"method": "secateur", "recovery": {"layerwise": {"kind": "least-squares", "damping": 0.5}}},
]


@pytest.mark.parametrize("changes", slow_but([MIXED[0], MIXED[3]], MIXED))
def test_kinds_can_be_mixed(changes: dict[str, Any], trained_folder: Path, tmp_path: Path) -> None:
    asked = spec(**changes)
    report = run(trained_folder, tmp_path / "out", asked).report
    prunable = report["parameters"]["prunable_before"]
    assert abs(report["ratio"]["reached"] - 0.3) * prunable <= UNIT / 2 + 1
    run(trained_folder, tmp_path / "plain", spec(method=changes["method"]))
    assert not same_weights(tmp_path / "out", tmp_path / "plain"), "or the override was ignored"


def test_least_squares_makes_up_for_what_went(trained_folder: Path, tmp_path: Path) -> None:
    reports = {
        kind: run(
            trained_folder, tmp_path / kind, spec(method="wanda", rounds=1, recovery={"layerwise": {"kind": kind}})
        ).report
        for kind in ("none", "bias", "linear-regression", "least-squares")
    }
    after = {kind: report["perplexity"]["after"] for kind, report in reports.items()}
    assert after["least-squares"] < after["linear-regression"] < after["none"] and after["bias"] < after["none"]


def test_added_biases_load_in_a_process_that_never_saw_this(
    trained_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(static, "check_checkpoint", check_checkpoint)
    run(trained_folder, tmp_path / "out", spec(method="slimllm", rounds=1, target_ratio=0.2))
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["added_biases"] == ["mlp.down_proj", "self_attn.o_proj"]
    weights = load_file(tmp_path / "out" / "model.safetensors")
    assert any(weights[f"model.layers.{index}.mlp.down_proj.bias"].any() for index in range(3))


@pytest.mark.parametrize("method", ["magnitude", "flap"])
@pytest.mark.parametrize(("dtype", "size"), slow_but([("bfloat16", 2)], [("float32", 4), ("bfloat16", 2)]))
def test_a_size_can_be_asked_for(method: str, dtype: str, size: int, trained_folder: Path, tmp_path: Path) -> None:
    for name, target in (("parameters", 100_000), ("bytes", 90_000 * size)):
        asked = spec(method=method, rounds=1, dtype=dtype, target_ratio=None, goal={name: target})
        report = run(trained_folder, tmp_path / name, asked).report
        reached = {"parameters": report["parameters"], "bytes": report["weights_bytes"]}[name]["after"]
        biases = 0 if method == "magnitude" else 6 * 48
        assert abs(reached - target) / (size if name == "bytes" else 1) <= UNIT / 2 + biases


def test_no_text_at_all_works_without_a_network(trained_folder: Path, tmp_path: Path) -> None:
    asked = PruningSpec(
        target_ratio=0.2,
        method="piem",
        calibration=Calibration(samples=4, sequence_length=32),
        evaluation=Evaluation(samples=4, sequence_length=32),
    )
    reports = [run(trained_folder, tmp_path / name, asked).report for name in ("a", "b")]
    assert reports[0]["calibration"] == {
        "source": "sampled from the model",
        "windows": 4,
        "sequence_length": 32,
        "tokens": 128,
    }
    assert reports[0]["perplexity"] == reports[1]["perplexity"]
    assert reports[0]["latency"]["after"]["prefill_ms"] > 0 and reports[0]["peak_memory_bytes"]["after"] > 0


def test_evaluation_text_is_held_out(trained_folder: Path, tmp_path: Path) -> None:
    events: list[dict[str, Any]] = []
    asked = spec(evaluation=Evaluation(sequence_length=64, samples=4096, latency=False), rounds=1)
    report = run(trained_folder, tmp_path / "out", asked, on_event=events.append).report
    assert report["evaluation"]["source"] == "held out of 12 texts of the request"
    tokens = len(make_tokenizer()("\n\n".join(english("calibration"))).input_ids)
    assert report["evaluation"]["windows"] == tokens // 5 // 64, "a fifth, which calibration does not see"
    assert any("evaluation" in event["message"] for event in events if event["type"] == "warning")


def test_exact_shielding_and_the_estimate_can_be_asked_for(trained_folder: Path, tmp_path: Path) -> None:
    reports = {
        how: run(trained_folder, tmp_path / how, spec(method="piem", rounds=1, scoring=Scoring(shielding=how))).report
        for how in ("exact", "estimate", "auto")
    }
    assert reports["auto"]["perplexity"] == reports["exact"]["perplexity"]
    assert reports["auto"]["steps"][0]["shielding"] == "exact"
    assert reports["estimate"]["steps"][0]["shielding"] == "estimate"


def test_request_texts_are_not_published(trained_folder: Path, tmp_path: Path) -> None:
    planted = "The secret recipe of the house calls for saffron. " * 60
    asked = spec(rounds=1, calibration=Calibration(texts=[planted], samples=4, sequence_length=64))
    run(trained_folder, tmp_path / "out", asked)
    for file in (tmp_path / "out").iterdir():
        assert b"saffron" not in file.read_bytes(), file


@pytest.mark.parametrize("dtype", slow_but(["bfloat16"], ["bfloat16", "float16"]))
def test_half_precision(dtype: str, trained_folder: Path, tmp_path: Path) -> None:
    report = run(trained_folder, tmp_path / "out", spec(dtype=dtype, rounds=1)).report
    single = run(trained_folder, tmp_path / "single", spec(rounds=1)).report
    assert report["dtype"] == dtype and report["weights_bytes"]["after"] * 2 == single["weights_bytes"]["after"]
    assert report["perplexity"]["after"] == pytest.approx(single["perplexity"]["after"], rel=0.2)


def test_progress_only_grows(trained_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "INTERVAL", 0)
    events: list[dict[str, Any]] = []
    run(trained_folder, tmp_path / "out", spec(), on_event=events.append)
    shares = [event["share"] for event in events if event["type"] == "progress"]
    assert shares == sorted(shares) and shares[0] == 0 and shares[-1] == 1
    stages = [event["stage"] for event in events if event["type"] == "progress"]
    assert list(dict.fromkeys(stages)) == [
        "downloading",
        "loading",
        "calibrating",
        "evaluating",
        "scoring",
        "exporting",
        "checking",
        "done",
    ]
    events.clear()
    run(trained_folder, tmp_path / "several", spec(method="magnitude", target_ratio=[0.2, 0.5]), on_event=events.append)
    told = [(event["stage"], event["step"]) for event in events if event["type"] == "progress"]
    assert [told.index(("exporting", number)) < told.index(("checking", number)) for number in (2, 4)] == [True, True]
    assert told.index(("checking", 2)) < told.index(("scoring", 3))


def test_sampling_ignores_the_models_own_generation_settings(trained_folder: Path, tmp_path: Path) -> None:
    model = LlamaForCausalLM.from_pretrained(trained_folder)
    model.generation_config.repetition_penalty = 3.0
    changed = save(model, make_tokenizer(), tmp_path / "changed")
    short = {"samples": 4, "sequence_length": 32}
    asked = PruningSpec(target_ratio=0.2, method="piem", calibration=short, evaluation={**short, "latency": False})
    reports = [run(folder, tmp_path / f"out-{folder.name}", asked).report for folder in (trained_folder, changed)]
    assert reports[0]["perplexity"] == reports[1]["perplexity"]


def test_licences_go_along(trained_folder: Path, tmp_path: Path) -> None:
    shutil.copytree(trained_folder, tmp_path / "source")
    for name in ("LICENSE.txt", "NOTICE", "USE_POLICY.md"):
        (tmp_path / "source" / name).write_text("terms")
    run(tmp_path / "source", tmp_path / "out", spec(rounds=1))
    assert all((tmp_path / "out" / name).exists() for name in ("LICENSE.txt", "NOTICE", "USE_POLICY.md"))
    assert str(tmp_path) not in "".join(
        file.read_text() for file in (tmp_path / "out").glob("*.[mj]*") if file.suffix != ".safetensors"
    )


@pytest.mark.parametrize(
    ("method", "rounds"), slow_but([("piem-lsps", 2)], [("magnitude", 3), ("piem-lsps", 2), ("secateur", 1)])
)
@pytest.mark.parametrize("ratio", [0.2, 0.45])
def test_uniform_layers_are_all_alike(
    method: str, rounds: int, ratio: float, trained_folder: Path, tmp_path: Path
) -> None:
    shape = load(locate(str(trained_folder), allow_paths=True), "auto").shape
    reached = shape.nearest_ratio(ratio, 8, uniform=True)
    asked = spec(method=method, rounds=rounds, target_ratio=reached, layout="uniform", allocation={"width_multiple": 8})
    report = run(trained_folder, tmp_path / "out", asked).report
    assert report["ratio"]["reached"] == pytest.approx(reached)
    assert len({tuple(layer.values())[1:] for layer in report["widths"]["after"]}) == 1
    assert report["components"]["allocator"] == "uniform"


def test_a_ratio_that_equal_layers_cannot_make_is_refused(trained_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(PruningError, match="all layers are alike") as caught:
        run(trained_folder, tmp_path / "out", spec(target_ratio=0.03, method="magnitude", layout="uniform"))
    assert caught.value.code == "ratio_unreachable"


def test_padding_changes_nothing_but_the_size(trained_folder: Path, tmp_path: Path) -> None:
    reports = {
        layout: run(trained_folder, tmp_path / layout, spec(method="secateur", layout=layout)).report
        for layout in ("per-layer", "padded")
    }
    for key in ("perplexity", "ratio", "widths"):
        assert reports["padded"][key] == reports["per-layer"][key]
    weights = load_file(tmp_path / "padded" / "model.safetensors")
    assert reports["padded"]["published"]["parameters"] == sum(tensor.numel() for tensor in weights.values())
    assert reports["per-layer"]["published"]["parameters"] == reports["per-layer"]["parameters"]["after"]
    assert "with the zeros" in (tmp_path / "padded" / "README.md").read_text()
    sizes = [(tmp_path / layout / "model.safetensors").stat().st_size for layout in reports]
    assert sizes[0] < sizes[1]


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"method": "slimllm", "layout": "padded"}, "biases that recovery 'linear-regression' adds"),
        ({"method": "slimllm", "layout": "uniform", "recovery": {"training": {"kind": "lora"}}}, "biases"),
        ({"method": "secateur", "layout": "uniform", "allocation": {"kind": "cosine"}}, "leave allocation.kind out"),
        ({"method": "secateur", "formats": ["gguf"]}, "allowed: \\['safetensors'\\]"),
    ],
)
def test_what_does_not_go_together_is_refused(changes: dict[str, Any], says: str) -> None:
    with pytest.raises(ValidationError, match=says):
        spec(**changes)
