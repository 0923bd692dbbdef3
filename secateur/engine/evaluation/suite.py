"""What the request asks to be measured of the unpruned model and of each pruned one beside the perplexity of every round."""

import math
import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from secateur.catalog.spec import Evaluation
from secateur.engine.evaluation.generation import PROMPTS, generations
from secateur.engine.evaluation.latency import QUICK, SLIMLLM, measure_latency
from secateur.engine.evaluation.perplexity import perplexity
from secateur.engine.evaluation.zero_shot import zero_shot
from secateur.engine.measure.texts import batch_windows
from secateur.engine.model.decoder import Decoder


@dataclass(frozen=True)
class Suite:
    """``texts``: the windows ``[windows, length]`` of each named text."""

    asked: Evaluation
    texts: Mapping[str, Tensor]
    tasks_dir: Path | None

    @property
    def lengthy(self) -> bool:
        """Whether texts or tasks were asked for."""
        return bool(self.texts or self.asked.zero_shot)

    def measure(self, decoder: Decoder, progress: Callable[[float], None]) -> dict[str, Any]:
        """``benchmarks`` {``perplexity`` by text, ``zero_shot`` by task}, ``generations`` {``prompt``, ``text``}, ``latency``.

        Raises:
            PruningError: see :func:`perplexity` and :func:`zero_shot`.
        """
        parts = len(self.texts) + bool(self.asked.zero_shot)
        done = 0

        def share(of_part: float) -> None:
            progress((done + of_part) / parts)  # of the parts that take long

        perplexities = {}
        for name, tokens in self.texts.items():
            value = perplexity(decoder, tokens, batch_windows(tokens), share)
            perplexities[name] = value if math.isfinite(value) else None  # JSON has no infinity
            done += 1
        tasks = self.asked.zero_shot
        accuracies = zero_shot(decoder, tasks, self.tasks_dir, self.asked.limit, share) if tasks else {}
        prompts = PROMPTS if self.asked.prompts is None else self.asked.prompts
        written = zip(prompts, generations(decoder, prompts), strict=True)
        return {
            "benchmarks": {"perplexity": perplexities, "zero_shot": accuracies},
            "generations": [{"prompt": prompt, "text": text} for prompt, text in written],
            "latency": self._latency(decoder),
        }

    def _latency(self, decoder: Decoder) -> dict[str, Any] | None:
        if not self.asked.latency:
            return None
        return measure_latency(decoder, SLIMLLM if self.asked.latency == "slimllm" else QUICK)


def paired(before: Mapping[str, Any], after: Mapping[str, Any]) -> dict[str, Any]:
    """The report's part: what :meth:`Suite.measure` found of the unpruned model and of the pruned one, side by side.

    ``retained_accuracy`` is the mean accuracy over the tasks after pruning, as a share of that before.
    """
    tasks = {}
    for name, old in before["benchmarks"]["zero_shot"].items():
        new = after["benchmarks"]["zero_shot"][name]
        tasks[name] = {
            "metric": old["metric"],
            "before": old["value"],
            "after": new["value"],
            "before_stderr": old["stderr"],
            "after_stderr": new["stderr"],
            "examples": old["examples"],
            "source": old["source"],
        }
    mean = {when: statistics.fmean(task[when] for task in tasks.values()) for when in ("before", "after") if tasks}
    return {
        "benchmarks": {
            "perplexity": {
                name: {"before": value, "after": after["benchmarks"]["perplexity"][name]}
                for name, value in before["benchmarks"]["perplexity"].items()
            },
            "zero_shot": tasks,
            "zero_shot_mean": mean or None,
        },
        "retained_accuracy": mean["after"] / mean["before"] if mean and mean["before"] else None,
        "generations": [
            {"prompt": old["prompt"], "before": old["text"], "after": new["text"]}
            for old, new in zip(before["generations"], after["generations"], strict=True)
        ],
    }
