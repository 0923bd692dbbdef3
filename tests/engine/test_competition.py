"""Structures that compete for a ratio: the splits, the search among them, and a run that takes the best."""

import itertools
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedTokenizerFast

import secateur
from secateur.catalog.architectures import shape_from_config
from secateur.catalog.budget import QUARTERS, block, splits, without_whole
from secateur.catalog.spec import Calibration, Evaluation, PruningSpec
from secateur.contract.errors import PruningError
from secateur.contract.events import Event, ProgressEvent, StepEvent
from secateur.contract.report import StepKind
from secateur.contract.stages import Stage
from secateur.engine.run.competition import halves, lowest
from secateur.engine.run.run import NamedModel, prune_to_folder
from secateur.engine.run.workspace import Listener, Workspace
from tests.engine.models import english, make_model, save
from tests.tiers import slow_but

DEPTH = 8


def spec(**changes: Any) -> PruningSpec:
    plain = {
        "method": "secateur",
        "target_ratio": 0.3,
        "rounds": 1,
        "structures": ["layers", "kv_groups", "channels"],
        "calibration": Calibration(texts=english("calibration"), samples=8, sequence_length=32),
        "evaluation": Evaluation(texts=english("evaluation"), samples=4, sequence_length=32, latency=False, prompts=[]),
        "allocation": {"width_multiple": 8},
    }
    return PruningSpec(**{**plain, **changes})


@pytest.mark.parametrize(
    ("family", "structures"),
    [
        ("llama", ["layers", "kv_groups", "channels"]),
        ("llama", ["attention", "feed_forward", "kv_groups", "channels"]),
        ("mixtral", ["layers", "experts"]),
        ("mixtral", ["experts", "kv_groups", "channels"]),
    ],
)
@pytest.mark.parametrize("ratio", [0.25, 0.3, 0.5])
def test_every_split_can_meet_the_ratio(family: str, structures: list[str], ratio: float) -> None:
    config = json.loads(make_model(family, num_hidden_layers=DEPTH).config.to_json_string())
    shape = shape_from_config(config)
    found = splits(shape, config, structures, ratio, 8, False)
    whole = [name for name in structures if name not in ("kv_groups", "channels")]
    widths = len(whole) < len(structures)
    assert all(len(parts) == len(whole) + widths and sum(parts) == QUARTERS for parts in found)
    assert len({tuple(counts.items()) for counts in found.values()}) == len(found), "no split is tried twice"
    for counts in found.values():
        after = without_whole(shape, counts)
        left = after.prunable_parameters + after.standing_in(shape)
        missing = ratio * shape.prunable_parameters - shape.prunable_parameters + left
        assert missing > 0 if widths else abs(missing) <= block(shape, structures, 8, False) / 2
    if widths:
        assert found[(*(0 for _ in whole), QUARTERS)] == {}, "widths alone"
    assert any(all(counts.get(name) for name in whole) for counts in found.values())


def test_no_split_at_all_is_refused() -> None:
    config = json.loads(make_model("mixtral", num_hidden_layers=2).config.to_json_string())
    with pytest.raises(PruningError) as caught:
        splits(shape_from_config(config), config, ["layers", "experts"], 0.02, 8, False)
    assert caught.value.code == "ratio_unreachable"


@pytest.mark.parametrize("structures", [["experts", "kv_groups", "channels"], ["layers", "experts"]])
def test_a_structure_that_the_model_lacks_is_refused(structures: list[str]) -> None:
    config = json.loads(make_model("llama").config.to_json_string())
    with pytest.raises(PruningError, match="no 'experts'; allowed: layers") as caught:
        splits(shape_from_config(config), config, structures, 0.3, 8, False)
    assert (caught.value.code, caught.value.field) == ("structure_unsupported", "structures")


@pytest.mark.parametrize("groups", [2, 3])
@pytest.mark.parametrize("seed", range(8))
def test_the_search_finds_the_lowest_of_a_convex_loss(groups: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    best = torch.rand(groups, generator=generator)
    aim = best / best.sum() * QUARTERS
    every = {
        parts: {"layers": number}
        for number, parts in enumerate(itertools.product(range(QUARTERS + 1), repeat=groups))
        if sum(parts) == QUARTERS
    }
    names = {number["layers"]: parts for parts, number in every.items()}
    measured: list[tuple[int, ...]] = []

    def loss(removed: Any) -> float:
        measured.append(names[removed["layers"]])
        return float((torch.tensor(measured[-1]) - aim).square().sum())

    tried = lowest(every, loss)
    assert len(measured) == len(set(measured)) == len(tried), "nothing is measured twice"
    assert list(tried.values()) == sorted(tried.values())
    assert next(iter(tried.values())) == min(float((torch.tensor(parts) - aim).square().sum()) for parts in every)


def test_what_measures_was_not_calibrated_on() -> None:
    tokens = torch.arange(12).view(6, 2)
    calibrating, measuring = halves(tokens)
    assert sorted([*calibrating[:, 0].tolist(), *measuring[:, 0].tolist()]) == tokens[:, 0].tolist()
    assert not {*calibrating[:, 0].tolist()} & {*measuring[:, 0].tolist()}
    assert all(torch.equal(part, tokens[:1]) for part in halves(tokens[:1])), "one window does both"


CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "layers-and-widths": ("llama", {}),
    "sublayers-and-widths": (
        "llama",
        {"structures": ["attention", "feed_forward", "kv_groups", "channels"], "layout": "padded"},
    ),
    "experts-and-widths": ("mixtral", {"structures": ["experts", "kv_groups", "channels"]}),
    "layers-and-experts": ("mixtral", {"structures": ["layers", "experts"]}),
    "by-gradients": ("llama", {"method": "piem-lsps", "rounds": 2, "scoring": {"kind": "sleb"}}),
}


@pytest.mark.parametrize("name", slow_but(["layers-and-widths"], CASES))
def test_the_split_of_the_lowest_loss_is_taken(name: str, tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    family, changes = CASES[name]
    source = NamedModel(str(save(make_model(family, num_hidden_layers=4), tokenizer, tmp_path / "source")))
    asked = spec(**changes)
    (report,) = prune_to_folder(source, asked, tmp_path / "out")
    trials = next(step.trials for step in report.steps if step.trials)
    losses = [math.inf if trial.loss is None else trial.loss for trial in trials]
    assert len(trials) >= 2 and losses == sorted(losses)
    assert abs(report.ratio.reached - 0.3) < 0.1
    taken, after = trials[0].removed, report.widths.after
    assert sum(not (layer.kv_groups or layer.channels) for layer in after) == taken.get("layers", 0)
    assert sum(not layer.kv_groups and layer.channels > 0 for layer in after) == taken.get("attention", 0)
    left = [layer.experts for layer in after if layer.channels]
    assert {report.widths.before[0].experts - experts for experts in left} == {taken.get("experts", 0)}


@pytest.mark.parametrize("done", [1, None], ids=["after-one-trial", "after-all-trials"])
def test_what_was_tried_is_not_tried_again(
    done: int | None, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    """A run is killed between its trials or before its first round, and goes on from its last event."""
    source = NamedModel(str(save(make_model("llama", num_hidden_layers=4), tokenizer, tmp_path / "source")))
    whole = list[Event]()
    (expected,) = prune_to_folder(source, spec(), tmp_path / "whole", listener=Listener(whole.append))
    trials = expected.steps[0].trials
    tried = [event for event in whole if isinstance(event, StepEvent) and event.step.kind == StepKind.TRIAL]
    assert trials is not None and Stage.SEARCHING in stages(whole)
    assert [event.step.number for event in tried] == list(range(1, len(trials) + 1))
    done, later = done or len(tried), list[Event]()
    workspace, listener = Workspace(scratch=tmp_path / "run"), Listener(later.append)
    (report,) = prune_to_folder(source, spec(), tmp_path / "out", workspace, listener, resume=tried[done - 1].state)
    again = [event for event in later if isinstance(event, StepEvent) and event.step.kind == StepKind.TRIAL]
    assert [event.step.trials for event in again] == [event.step.trials for event in tried[done:]]
    assert (Stage.SEARCHING in stages(later)) == bool(again)
    assert report.steps[0].trials == trials and report.widths == expected.widths
    assert report.perplexity == expected.perplexity


def test_a_loaded_model_stays_as_it_is(tokenizer: PreTrainedTokenizerFast) -> None:
    model = make_model("llama", num_hidden_layers=4)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    recipe = {
        "method": "secateur",
        "structures": ["layers", "kv_groups", "channels"],
        "calibration": {"texts": english("calibration"), "samples": 8, "sequence_length": 32},
        "evaluation": {
            "texts": english("evaluation"),
            "samples": 4,
            "sequence_length": 32,
            "latency": False,
            "prompts": [],
        },
    }
    result = secateur.prune(model, tokenizer=tokenizer, ratio=0.3, recipe=recipe, progress=False)
    assert result.model is not model and result.report.steps[0].trials
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def stages(events: list[Event]) -> set[Stage]:
    return {event.stage for event in events if isinstance(event, ProgressEvent)}
