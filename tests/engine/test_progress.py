"""Shares, rates and time left, on a clock of the test's."""

from typing import Any

import pytest

from secateur.catalog.resolve import components
from secateur.catalog.spec import PruningSpec
from secateur.contract.stages import Stage
from secateur.engine.run.progress import CHECK_SECONDS, Progress
from secateur.engine.run.workspace import Listener


class Clock:
    """``monotonic``, and what was told when."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, **spec: Any) -> None:
        self.now = 100.0
        monkeypatch.setattr("secateur.engine.run.progress.time.monotonic", lambda: self.now)
        self.events: list[dict[str, Any]] = []
        asked = PruningSpec(**{"target_ratio": 0.2, "method": "piem", "rounds": 3, **spec})
        listener = Listener(lambda event: self.events.append(event.as_dict()))
        self.progress = Progress(listener, asked, components(asked))

    def spend(self, stage: str, seconds: float, tokens: int | None = None) -> None:
        """A stage, in ten steps."""
        self.progress.stage(Stage(stage), tokens=tokens)
        for step in range(1, 11):
            self.now += seconds / 10
            self.progress.share(step / 10)


def test_time_left_is_what_stages_of_the_same_kind_took(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    clock.progress.weights(1_000_000_000)
    for stage, seconds in (("downloading", 50), ("loading", 3), ("calibrating", 9), ("evaluating", 12)):
        clock.spend(stage, seconds)
    for _ in range(2):
        clock.spend("scoring", 20)
        clock.spend("evaluating", 4)
    left = clock.events[-1]["remaining_seconds"]
    assert left == 20 + 12 + 2 + (CHECK_SECONDS + 2), "the last evaluation is as long as the first one"
    clock.spend("scoring", 20)
    clock.spend("evaluating", 12)
    assert clock.events[-1]["remaining_seconds"] == left - 32


def test_nothing_is_guessed_from_a_download(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    clock.spend("downloading", 500)
    clock.spend("loading", 30)
    assert all(event["remaining_seconds"] is None for event in clock.events)


def test_rates(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    clock.progress.stage(Stage.DOWNLOADING)
    clock.now += 4
    clock.progress.bytes(1_000_000, 8_000_000)
    told = clock.events[-1]
    assert (told["rate"], told["rate_unit"], told["stage_share"]) == (250_000.0, "bytes/s", 0.125)
    clock.spend("calibrating", 10, tokens=5_000)
    assert (clock.events[-1]["rate"], clock.events[-1]["rate_unit"]) == (500.0, "tokens/s")
    clock.progress.stage(Stage.EVALUATING)
    assert (clock.events[-1]["rate"], clock.events[-1]["rate_unit"], clock.events[-1]["stage_share"]) == (
        None,
        None,
        0.0,
    )


def test_several_targets_and_training_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch, target_ratio=[0.2, 0.4], rounds=1, recovery={"training": {"kind": "lora"}})
    for stage in ("downloading", "loading", "calibrating", "evaluating"):
        clock.spend(stage, 1)
    for target in range(2):
        if target:
            clock.spend("loading", 3)
        for stage, seconds in (
            ("scoring", 4),
            ("evaluating", 1),
            ("training", 30),
            ("evaluating", 1),
            ("exporting", 2),
        ):
            clock.spend(stage, seconds)
        clock.spend("checking", 6)
        if target == 0:
            assert clock.events[-1]["remaining_seconds"] == pytest.approx(
                1 + 4 + 1 + 30 + 1 + 2 + CHECK_SECONDS + 2, abs=0.2
            )
    clock.progress.done()
    shares = [event["share"] for event in clock.events]
    assert shares == sorted(shares) and shares[-1] == 1.0 and clock.events[-1]["step"] == 4
