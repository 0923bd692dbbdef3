"""Measure what the request asks for, beside the perplexity of every step.

The unpruned model and each pruned model are measured.
"""

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from secateur.catalog.spec import Evaluation
from secateur.contract.report import (
    BenchmarkChange,
    Benchmarks,
    Change,
    Continuation,
    GenerationChange,
    Latency,
    Measurement,
    TaskChange,
)
from secateur.engine.evaluation.generation import PROMPTS, generations
from secateur.engine.evaluation.latency import QUICK, SLIMLLM, measure_latency
from secateur.engine.evaluation.perplexity import perplexity
from secateur.engine.evaluation.zero_shot import zero_shot
from secateur.engine.measure.texts import batch_windows
from secateur.engine.model.decoder import Decoder


@dataclass(frozen=True)
class Suite:
    """The measurements that the request asks for.

    ``texts`` holds the windows ``[windows, length]`` of each named text.
    """

    asked: Evaluation
    texts: Mapping[str, Tensor]
    tasks_dir: Path | None

    @property
    def lengthy(self) -> bool:
        """Whether the request asks for texts or tasks, which take long to measure."""
        return bool(self.texts or self.asked.zero_shot)

    def measure(self, decoder: Decoder, progress: Callable[[float], None]) -> Measurement:
        """Return benchmarks by text and task, generations, and latency; the other figures are left out.

        Raises:
            PruningError: the errors of :func:`perplexity` and :func:`zero_shot`.
        """
        parts = len(self.texts) + bool(self.asked.zero_shot)
        done = 0

        def share(of_part: float) -> None:
            progress((done + of_part) / parts)  # only texts and tasks take long

        perplexities = {}
        for name, tokens in self.texts.items():
            value = perplexity(decoder, tokens, batch_windows(tokens), share)
            perplexities[name] = value if math.isfinite(value) else None  # JSON has no infinity
            done += 1
        tasks = self.asked.zero_shot
        accuracies = zero_shot(decoder, tasks, self.tasks_dir, self.asked.limit, share) if tasks else {}
        prompts = PROMPTS if self.asked.prompts is None else self.asked.prompts
        written = zip(prompts, generations(decoder, prompts), strict=True)
        return Measurement(
            benchmarks=Benchmarks(perplexity=perplexities, zero_shot=accuracies),
            generations=[Continuation(prompt=prompt, text=text) for prompt, text in written],
            latency=self._latency(decoder),
        )

    def _latency(self, decoder: Decoder) -> Latency | None:
        if not self.asked.latency:
            return None
        return measure_latency(decoder, SLIMLLM if self.asked.latency == "slimllm" else QUICK)


def compare_benchmarks(before: Benchmarks, after: Benchmarks) -> tuple[BenchmarkChange, float | None]:
    """Return the scores of the unpruned model and of the pruned one side by side, and the retained accuracy.

    The retained accuracy is the mean accuracy over the tasks after pruning, as a share of the mean accuracy before
    pruning; it is ``None`` without tasks.
    """
    tasks = {}
    for name, old in before.zero_shot.items():
        new = after.zero_shot[name]
        tasks[name] = TaskChange(
            metric=old.metric,
            before=old.value,
            after=new.value,
            before_stderr=old.stderr,
            after_stderr=new.stderr,
            examples=old.examples,
            source=old.source,
        )
    mean_before = statistics.fmean(task.before for task in tasks.values()) if tasks else 0.0
    mean_after = statistics.fmean(task.after for task in tasks.values()) if tasks else 0.0
    change = BenchmarkChange(
        perplexity={
            name: Change(before=value, after=after.perplexity[name]) for name, value in before.perplexity.items()
        },
        zero_shot=tasks,
        zero_shot_mean=Change(before=mean_before, after=mean_after) if tasks else None,
    )
    return change, mean_after / mean_before if mean_before else None


def compare_generations(before: Sequence[Continuation], after: Sequence[Continuation]) -> list[GenerationChange]:
    """Return what the unpruned model and the pruned one generate from each prompt, side by side."""
    return [
        GenerationChange(prompt=old.prompt, before=old.text, after=new.text)
        for old, new in zip(before, after, strict=True)
    ]
