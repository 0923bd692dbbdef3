"""The flat figures of a step, against the step that a run records."""

import datetime as dt
import math

from secateur.contract.jobs import StepMetrics
from secateur.contract.report import (
    Benchmarks,
    Latency,
    ReachedRatio,
    Spread,
    Step,
    StepKind,
    TaskScore,
    TrainingCurve,
)

NOW = dt.datetime(2026, 1, 1, tzinfo=dt.UTC)


def row(step: Step) -> StepMetrics:
    return StepMetrics.of_step(step.number, 2, NOW, step.as_dict())


def test_every_figure_of_a_whole_step() -> None:
    latency = Latency(
        prefill_ms=10.0, decode_ms_per_token=4.0, tokens_per_second=250.0, energy_joules_per_token=None,
        spread=Spread(prefill_ms=(9.0, 13.0), decode_ms_per_token=(4.0, 5.0)), prefill_tokens=256, decode_tokens=16,
        batch_size=1, repeats=5, peak_memory_bytes=1000, device="cpu", threads=2,
    )  # fmt: skip
    scores = {
        name: TaskScore(metric="acc", value=value, stderr=None, examples=10, source="lm-eval")
        for name, value in (("piqa", 0.5), ("boolq", 0.7))
    }
    step = Step(
        number=3, kind=StepKind.TRAINING, target_ratio=0.2, ratio=ReachedRatio(target=0.2, reached=0.19), perplexity=8.0,
        parameters=80, prunable_parameters=60, weights_bytes=160, flops=7, seconds=1.5, latency=latency,
        benchmarks=Benchmarks(perplexity={}, zero_shot=scores),
        training=TrainingCurve(kind="lora", step=4, steps=4, loss=[3.0, 2.5]),
    )  # fmt: skip
    assert row(step) == StepMetrics(
        step=3, kind=StepKind.TRAINING, attempt=2, completed_at=NOW, target_ratio=0.2, planned_ratio=0.2, reached_ratio=0.19,
        perplexity=8.0, loss=math.log(8.0), training_step=4, training_loss=2.5, zero_shot_mean=0.6, parameters=80,
        prunable_parameters=60, weights_bytes=160, flops=7, prefill_ms=10.0, decode_ms_per_token=4.0,
        tokens_per_second=250.0, peak_memory_bytes=1000, seconds=1.5,
    )  # fmt: skip


def test_what_a_step_did_not_measure_is_null() -> None:
    assert row(Step(number=0, kind=StepKind.BASELINE, perplexity=None, latency=None)) == StepMetrics(
        step=0, kind=StepKind.BASELINE, attempt=2, completed_at=NOW
    )
    part = Step(number=1, kind=StepKind.TRAINING, training=TrainingCurve(kind="lora", step=0, steps=4, loss=[]))
    assert (row(part).training_step, row(part).training_loss) == (0, None)
