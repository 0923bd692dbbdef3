"""How far a pruning is, how fast it goes, and how long it will still take."""

import time
from collections.abc import Callable
from typing import Any, Literal

from secateur.catalog.spec import PruningSpec

INTERVAL = 0.5
UNLIKE = ("downloading", "loading", "calibrating", "exporting", "checking")
"""Stages whose time says nothing of the others': they read and write files, start a process, or do nothing."""
# Rough cost of each stage in forward passes over the calibration text: only the shape of the bar depends on them, and the
# time left until a stage of the same kind has been seen.
STAGE_COST = {
    "downloading": 1.0,
    "loading": 1.0,
    "calibrating": 1.0,
    "scoring": 4.0,
    "evaluating": 0.5,
    "evaluating whole": 1.5,
    "exporting": 0.5,
    "checking": 1.0,
}
TRAINING_PASSES = 3.0
"""Of an epoch: a forward, and a backward of twice its work."""
CHECK_SECONDS = 5.0
"""To check a checkpoint, a process imports torch and transformers, whatever the model's size; after that it reads what exporting wrote."""
WRITTEN_PER_SECOND = 5e8
"""Bytes of weights, before an export has been seen: a common disk's."""


class Progress:
    """Turns stages and shares of a stage into ``progress`` events, at most two a second.

    ``share`` is of the whole job, ``stage_share`` of the stage. ``rate`` is what a stage gets through in a second, in
    ``rate_unit`` (``tokens/s``, ``bytes/s``); ``None`` where nothing is counted.

    Time left is, for each stage still to come, the time of one of the same kind that is over, or its cost relative to what is
    over. Evaluating has two kinds: the unpruned model and a target's last round are measured by more than the other rounds.
    """

    def __init__(self, on_event: Callable[[dict[str, Any]], None], spec: PruningSpec) -> None:
        self._on_event = on_event
        trained = spec.rounds_per_target - spec.round_count
        per_target = ["scoring"] * spec.round_count + ["training"] * trained
        self._kinds = ["downloading", "loading", "calibrating", "evaluating whole"]
        self._rounds_of = [0] * len(self._kinds)
        for target in range(spec.target_count):
            if target:
                self._kinds.append("loading")
                self._rounds_of.append(self._rounds_of[-1])
            for number, stage in enumerate(per_target, start=1):
                self._kinds += [stage, "evaluating whole" if number == len(per_target) else "evaluating"]
                self._rounds_of += [self._rounds_of[-1] + 1] * 2
            self._kinds += ["exporting", "checking"]
            self._rounds_of += [self._rounds_of[-1]] * 2
        self._rounds = spec.total_rounds
        passes = TRAINING_PASSES + (spec.training == "distill")  # the unpruned model's forward
        self._costs = {**STAGE_COST, "training": passes * spec.recovery.epochs}
        self._total = sum(self._costs[kind] for kind in self._kinds)
        self._checks = 2 if spec.is_dynamic else 1  # a dynamic checkpoint is loaded both ways
        self._index, self._done = -1, 0.0
        self._amount: float | None = None
        self._unit: str | None = None
        self._weight_bytes = 0
        self._seconds: dict[str, list[float]] = {}
        self._began = time.monotonic()
        self._sent = 0.0

    def stage(self, name: str, number: int | None = None, tokens: int | None = None) -> None:
        """The next stage of that ``name`` begins, of round ``number`` where a resumed job skips some. It has so many ``tokens``."""
        now = time.monotonic()
        if self._index >= 0:
            self._seconds.setdefault(self._kinds[self._index], []).append(now - self._began)
        self._index = next(
            index
            for index in range(self._index + 1, len(self._kinds))
            if self._kinds[index].split()[0] == name and number in (None, self._rounds_of[index])
        )
        self._began, self._done = now, 0.0
        self._count(tokens, "tokens/s")
        self._send(0.0)

    def weights(self, size: int) -> None:
        """The model has so many bytes of weights, which tells how long writing them takes."""
        self._weight_bytes = size

    def share(self, done: float) -> None:
        """``done`` of 1 of this stage is done; of the several passes that a stage may make, the furthest counts."""
        self._done = max(self._done, done)
        if time.monotonic() - self._sent >= INTERVAL:
            self._send(self._done)

    def bytes(self, done: int, total: int) -> None:
        """So many bytes of this stage are done."""
        self._count(total, "bytes/s")
        self.share(min(done / total, 1.0) if total else 0.0)

    def _count(self, amount: float | None, unit: Literal["tokens/s", "bytes/s"]) -> None:
        self._amount, self._unit = amount, None if amount is None else unit

    def done(self) -> None:
        self._index += 1
        self._done = 1.0
        self._count(None, "tokens/s")
        self._on_event(self._event("done", 1.0, 0.0))

    def _send(self, done: float) -> None:
        self._sent = time.monotonic()
        kind = self._kinds[self._index]
        passed = sum(self._costs[name] for name in self._kinds[: self._index])
        share = (passed + done * self._costs[kind]) / self._total
        self._on_event(self._event(kind.split()[0], share, self._remaining(done)))

    def _event(self, stage: str, share: float, remaining: float | None) -> dict[str, Any]:
        elapsed = time.monotonic() - self._began
        known = self._amount is not None and self._done > 0 and elapsed > 0
        return {
            "type": "progress",
            "stage": stage,
            "round": self._rounds_of[min(self._index, len(self._kinds) - 1)],
            "rounds": self._rounds,
            "share": round(share, 4),
            "stage_share": round(self._done, 4),
            "rate": round((self._amount or 0) * self._done / elapsed, 1) if known else None,
            "rate_unit": self._unit if known else None,
            "remaining_seconds": remaining,
        }

    def _remaining(self, done: float) -> float | None:
        over = [(kind, seconds) for kind, runs in self._seconds.items() for seconds in runs if kind not in UNLIKE]
        elapsed = time.monotonic() - self._began
        kind = self._kinds[self._index]
        if not over and (done < 0.2 or kind in UNLIKE):
            return None
        cost = sum(self._costs[name] for name, _ in over) + done * self._costs[kind]
        rate = (sum(seconds for _, seconds in over) + elapsed) / max(cost, 1e-9)

        def expected(kind: str) -> float:
            runs = self._seconds.get(kind)
            if runs:
                return sum(runs) / len(runs)
            if kind == "exporting":
                return self._weight_bytes / WRITTEN_PER_SECOND
            if kind == "checking":
                return self._checks * CHECK_SECONDS + expected("exporting")
            return self._costs[kind] * rate

        here = elapsed * (1 - done) / done if done > 0.2 else 0.0
        if done <= 0.2 or kind in self._seconds:  # what is counted may be over long before the stage is
            here = max(here, expected(kind) - elapsed)
        return round(here + sum(expected(name) for name in self._kinds[self._index + 1 :]), 1)
