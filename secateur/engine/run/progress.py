"""Progress of a pruning run: the share that is done, the rate, and the remaining time."""

import time

from secateur.catalog.methods import Need
from secateur.catalog.resolve import Components
from secateur.catalog.spec import PruningSpec
from secateur.contract.events import ProgressEvent, RateUnit
from secateur.contract.stages import Stage
from secateur.engine.run.workspace import Listener

INTERVAL = 0.5
WHOLE = "evaluating whole"
"""Evaluation with the whole suite, which only the unpruned model and the last step of a target have."""
UNLIKE = (Stage.DOWNLOADING, Stage.LOADING, Stage.CALIBRATING, Stage.EXPORTING, Stage.CHECKING)
"""Stages whose durations do not predict the durations of other stages: they read and write files, or start a
process."""
# Rough cost of each stage in forward passes over the calibration text. The costs shape the progress bar. They also give
# the remaining time of a stage until a stage of the same kind is over.
STAGE_COST: dict[str, float] = {
    Stage.DOWNLOADING: 1.0,
    Stage.LOADING: 1.0,
    Stage.CALIBRATING: 1.0,
    Stage.SEARCHING: 16.0,
    Stage.SCORING: 4.0,
    Stage.EVALUATING: 0.5,
    WHOLE: 1.5,
    Stage.EXPORTING: 0.5,
    Stage.CHECKING: 1.0,
}
TRAINING_PASSES = 3.0
"""Cost of an epoch in forward passes: one forward pass, and a backward pass of twice its work."""
CHECK_SECONDS = 5.0
"""Seconds in which the process that checks a checkpoint imports torch and transformers. The time does not depend on the
model's size; the process then reads the exported files."""
WRITTEN_PER_SECOND = 5e8
"""Bytes of weights written per second, as on a common disk; used until an export was measured."""


class Progress:
    """Converts stages and shares of a stage to progress events, at most two per second.

    The remaining time is a sum over the stages to come. A stage counts the mean duration of earlier stages of the same
    kind, or else its cost relative to the stages that are over. Evaluation has two kinds, see :data:`WHOLE`.
    """

    def __init__(self, listener: Listener, spec: PruningSpec, chosen: Components) -> None:
        self._listener = listener
        self._index, self._done = -1, 0.0
        self._amount: float | None = None
        self._unit: RateUnit | None = None
        self._weight_bytes = 0
        self._seconds: dict[str, list[float]] = {}
        self._began = time.monotonic()
        self._sent = 0.0
        self.expect(spec, chosen)

    def expect(self, spec: PruningSpec, chosen: Components) -> None:
        """Set the stages that the run has; those that are over must be the same as before."""
        per_target = [Stage.SCORING] * chosen.rounds + [Stage.TRAINING] * (chosen.training is not None)
        self._kinds: list[str] = [Stage.DOWNLOADING, Stage.LOADING, Stage.CALIBRATING, WHOLE]
        if spec.vocabulary is not None:  # the texts are encoded anew with the smaller vocabulary
            self._kinds.append(Stage.CALIBRATING)
        self._step_of = [0] * len(self._kinds)
        for target in range(chosen.targets):
            before = [Stage.SEARCHING] * chosen.competing + [Stage.LOADING] * (target > 0 or chosen.competing)
            self._kinds += before
            self._step_of += [self._step_of[-1]] * len(before)
            for number, stage in enumerate(per_target, start=1):
                self._kinds += [stage, WHOLE if number == len(per_target) else Stage.EVALUATING]
                self._step_of += [self._step_of[-1] + 1] * 2
            self._kinds += [Stage.EXPORTING, Stage.CHECKING]
            self._step_of += [self._step_of[-1]] * 2
        self._steps = chosen.steps
        self._costs = {**STAGE_COST, Stage.TRAINING: _training_cost(spec, chosen)}
        self._total = sum(self._costs[kind] for kind in self._kinds)
        # a dynamic checkpoint is loaded as the plain and as the dynamic model
        self._checks = 2 if chosen.dynamic else 1

    def stage(self, stage: Stage, step: int | None = None, tokens: int | None = None) -> None:
        """Begin the next stage of this kind.

        ``step`` is the step to which the stage belongs, which is needed when a resumed run skips steps. ``tokens`` is
        the number of tokens that the stage processes.
        """
        now = time.monotonic()
        if self._index >= 0:
            self._seconds.setdefault(self._kinds[self._index], []).append(now - self._began)
        self._index = next(
            index
            for index in range(self._index + 1, len(self._kinds))
            if self._kinds[index].split()[0] == stage and step in (None, self._step_of[index])
        )
        self._began, self._done = now, 0.0
        self._count(tokens, "tokens/s")
        self._send(0.0)

    def weights(self, size: int) -> None:
        """Set the size of the model's weights in bytes, from which the duration of an export is estimated."""
        self._weight_bytes = size

    def share(self, done: float) -> None:
        """Report that the share ``done``, from 0 to 1, of this stage is done.

        A stage may make several passes; the largest reported share counts.
        """
        self._done = max(self._done, done)
        if time.monotonic() - self._sent >= INTERVAL:
            self._send(self._done)

    def bytes(self, done: int, total: int) -> None:
        """Report that ``done`` of ``total`` bytes of this stage are done."""
        self._count(total, "bytes/s")
        self.share(min(done / total, 1.0) if total else 0.0)

    def _count(self, amount: float | None, unit: RateUnit) -> None:
        self._amount, self._unit = amount, None if amount is None else unit

    def done(self) -> None:
        """Report that the run is over."""
        self._index += 1
        self._done = 1.0
        self._count(None, "tokens/s")
        self._listener.on_event(self._event(Stage.DONE, 1.0, 0.0))

    def _send(self, done: float) -> None:
        self._sent = time.monotonic()
        kind = self._kinds[self._index]
        passed = sum(self._costs[name] for name in self._kinds[: self._index])
        share = (passed + done * self._costs[kind]) / self._total
        self._listener.on_event(self._event(Stage(kind.split()[0]), share, self._remaining(done)))

    def _event(self, stage: Stage, share: float, remaining: float | None) -> ProgressEvent:
        elapsed = time.monotonic() - self._began
        known = self._amount is not None and self._done > 0 and elapsed > 0
        return ProgressEvent(
            stage=stage,
            step=self._step_of[min(self._index, len(self._kinds) - 1)],
            steps=self._steps,
            share=round(share, 4),
            stage_share=round(self._done, 4),
            rate=round((self._amount or 0) * self._done / elapsed, 1) if known else None,
            rate_unit=self._unit if known else None,
            remaining_seconds=remaining,
        )

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
            if kind == Stage.EXPORTING:
                return self._weight_bytes / WRITTEN_PER_SECOND
            if kind == Stage.CHECKING:
                return self._checks * CHECK_SECONDS + expected(Stage.EXPORTING)
            return self._costs[kind] * rate

        here = elapsed * (1 - done) / done if done > 0.2 else 0.0
        if done <= 0.2 or kind in self._seconds:  # the counted work may end long before the stage ends
            here = max(here, expected(kind) - elapsed)
        return round(here + sum(expected(name) for name in self._kinds[self._index + 1 :]), 1)


def _training_cost(spec: PruningSpec, chosen: Components) -> float:
    """Return the cost of the training in forward passes over the calibration text.

    Distillation also runs the unpruned model.
    """
    settings = spec.recovery.training
    if settings is None or chosen.training is None:
        return 0.0
    return settings.epochs * (TRAINING_PASSES + (Need.REFERENCE in chosen.training.needs))
