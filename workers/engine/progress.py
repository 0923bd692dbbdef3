"""How far a pruning is, and how long it will still take."""

import time
from collections.abc import Callable
from typing import Any

from app.catalog.spec import PruningSpec

INTERVAL = 0.5
UNLIKE = ("loading", "calibrating")
"""Stages whose time says nothing of the others': they read files, or nothing."""
# Rough cost of each stage in forward passes over the calibration text: only the shape of the bar depends on them.
STAGE_COST = {
    "loading": 1.0,
    "calibrating": 1.0,
    "scoring": 4.0,
    "evaluating": 1.5,
    "training": 20.0,
    "exporting": 0.5,
    "checking": 1.0,
}


class Progress:
    """Turns stages and shares of a stage into ``progress`` events, at most two a second.

    Time left is the time of a stage of the same name that is over, or its cost relative to what is over, for each stage
    still to come.
    """

    def __init__(self, on_event: Callable[[dict[str, Any]], None], spec: PruningSpec) -> None:
        self._on_event = on_event
        trained = spec.rounds_per_target - spec.round_count
        per_target = ["scoring"] * spec.round_count + ["training"] * trained
        self._stages = ["loading", "calibrating", "evaluating"]
        self._rounds_of = [0, 0, 0]
        for _ in range(spec.target_count):
            for number, stage in enumerate(per_target, start=self._rounds_of[-1] + 1):
                self._stages += [stage, "evaluating"]
                self._rounds_of += [number, number]
            self._stages += ["exporting", "checking"]
            self._rounds_of += [self._rounds_of[-1]] * 2
        self._rounds = spec.total_rounds
        self._total = sum(STAGE_COST[stage] for stage in self._stages)
        self._index, self._done = -1, 0.0
        self._seconds: dict[str, list[float]] = {}
        self._began = time.monotonic()
        self._sent = 0.0

    def stage(self, name: str, number: int | None = None) -> None:
        """The next stage of that ``name`` begins, of round ``number`` where a resumed job skips some."""
        now = time.monotonic()
        if self._index >= 0:
            self._seconds.setdefault(self._stages[self._index], []).append(now - self._began)
        self._index = next(
            index
            for index in range(self._index + 1, len(self._stages))
            if self._stages[index] == name and number in (None, self._rounds_of[index])
        )
        self._began, self._done = now, 0.0
        self._send(0.0)

    def share(self, done: float) -> None:
        """``done`` of 1 of this stage is done; of the several passes that a stage may make, the furthest counts."""
        self._done = max(self._done, done)
        if time.monotonic() - self._sent >= INTERVAL:
            self._send(self._done)

    def done(self) -> None:
        self._index += 1
        self._on_event(self._event("done", 1.0, 0.0))

    def _send(self, done: float) -> None:
        self._sent = time.monotonic()
        stage = self._stages[self._index]
        passed = sum(STAGE_COST[name] for name in self._stages[: self._index])
        share = (passed + done * STAGE_COST[stage]) / self._total
        self._on_event(self._event(stage, share, self._remaining(done)))

    def _event(self, stage: str, share: float, remaining: float | None) -> dict[str, Any]:
        return {
            "type": "progress",
            "stage": stage,
            "round": self._rounds_of[min(self._index, len(self._stages) - 1)],
            "rounds": self._rounds,
            "share": round(share, 4),
            "remaining_seconds": remaining,
        }

    def _remaining(self, done: float) -> float | None:
        over = [(name, seconds) for name, runs in self._seconds.items() for seconds in runs if name not in UNLIKE]
        elapsed = time.monotonic() - self._began
        stage = self._stages[self._index]
        if not over and done < 0.2:
            return None
        cost = sum(STAGE_COST[name] for name, _ in over) + done * STAGE_COST[stage]
        rate = (sum(seconds for _, seconds in over) + elapsed) / max(cost, 1e-9)

        def expected(name: str) -> float:
            runs = self._seconds.get(name)
            return sum(runs) / len(runs) if runs else STAGE_COST[name] * rate

        here = elapsed * (1 - done) / done if done > 0.2 else max(expected(stage) - elapsed, 0.0)
        return round(here + sum(expected(name) for name in self._stages[self._index + 1 :]), 1)
