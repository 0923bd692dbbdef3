"""The tables of the quality benchmark: their cases, and their rendering with the results so far."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from benchmarks.case import Case
from benchmarks.table import excess_loss, markdown, mean_cell, perplexity_cell
from secateur.catalog.methods import METHODS


@dataclass(frozen=True)
class Row:
    """One line of a table. ``case`` stands for this line; its ratio and seed are replaced."""

    labels: tuple[str, ...]
    case: Case


@dataclass(frozen=True)
class Section:
    """One table with columns for each ratio; every cell is over all seeds."""

    title: str
    heads: tuple[str, ...]
    ratios: Sequence[float]
    seeds: Sequence[int]
    rows: Sequence[Row]

    def cases(self) -> Iterator[Case]:
        for row in self.rows:
            for ratio in self.ratios:
                yield from self._over_seeds(row, ratio)

    def render(self, known: Callable[[Case], dict[str, Any] | None]) -> str:
        """Return the section in Markdown, with dashes for missing results."""
        heads = [*self.heads]
        for ratio in self.ratios:
            heads += [f"{ratio:.0%}: perplexity", "excess", "s"]
        lines = []
        for row in self.rows:
            cells = [*row.labels]
            for ratio in self.ratios:
                results = [found for case in self._over_seeds(row, ratio) if (found := known(case)) is not None]
                perplexities = [result["perplexity"] for result in results]
                excess = [excess_loss(result["perplexity"], result["unpruned"]) for result in results]
                seconds = [result["seconds"] for result in results]
                cells += [perplexity_cell(perplexities), mean_cell(excess, 3), mean_cell(seconds, 0).split(" ")[0]]
            lines.append(cells)
        return f"## {self.title}\n\n{markdown(heads, lines)}"

    def _over_seeds(self, row: Row, ratio: float) -> list[Case]:
        return [replace(row.case, ratio=ratio, seed=seed) for seed in self.seeds]


def grid(
    base: Case, methods: Sequence[str], ratios: Sequence[float], rounds: Sequence[int], seeds: Sequence[int]
) -> Section:
    """Return the table of all methods on the model and calibration windows of ``base``."""
    model = "KV heads repeated to the query heads" if base.kv_heads == "repeated" else "KV heads as they are"
    title = f"{model}, {base.samples} × {base.sequence_length} tokens"
    rows = [
        Row((method, str(count)), replace(base, method=method, rounds=count)) for method in methods for count in rounds
    ]
    return Section(title, ("method", "rounds"), ratios, seeds, rows)


def variants(base: Case, methods: Sequence[str], ratios: Sequence[float], seeds: Sequence[int]) -> list[Section]:
    """Return one-round tables: with the KV heads as they are, and with other amounts of calibration text (SlimLLM: 32 × 128)."""
    others = (
        replace(base, kv_heads="as-is"),
        replace(base, samples=32, sequence_length=128),
        replace(base, samples=128, sequence_length=256),
    )
    return [grid(other, methods, ratios, [1], seeds) for other in others]


def trained(base: Case, seeds: Sequence[int]) -> Section:
    """Return the table of methods with training after the last round."""
    pairs = (("secateur", "distill"), ("slimllm", "lora"))
    rows = [
        Row(
            (method, kind),
            replace(
                base,
                method=method,
                rounds=METHODS[method].default_rounds,
                changes={"recovery": {"training": {"kind": kind}}},
            ),
        )
        for method, kind in pairs
    ]
    return Section("With training", ("method", "training"), [0.4], seeds, rows)
