"""A job's report for notebooks: figures by name, a table, and plots. matplotlib is imported for the first plot."""

import html
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from secateur.extras import require

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Row = tuple[str, str, str]


class Report:
    """The report of one pruned model. ``data`` holds the service's figures, which docs/evaluation.md defines."""

    def __init__(self, data: Mapping[str, Any]) -> None:
        self.data = data

    @classmethod
    def load(cls, path: Path | str) -> "Report":
        """Read a report from a file with its JSON."""
        return cls(json.loads(Path(path).read_text()))

    def __getitem__(self, name: str) -> Any:
        return self.data[name]

    @property
    def ratio(self) -> float:
        """The share of the prunable parameters that was removed."""
        return float(self.data["ratio"]["reached"])

    @property
    def parameters(self) -> tuple[int, int]:
        """The numbers of parameters before and after pruning."""
        return self.data["parameters"]["before"], self.data["parameters"]["after"]

    @property
    def perplexity(self) -> tuple[float | None, float | None]:
        """The perplexity before and after pruning; ``None`` means infinite."""
        return self.data["perplexity"]["before"], self.data["perplexity"]["after"]

    @property
    def retained_accuracy(self) -> float | None:
        """The mean zero-shot accuracy after pruning, as a share of that before; ``None`` if no task was requested."""
        value: float | None = self.data.get("retained_accuracy")
        return value

    @property
    def title(self) -> str:
        return f"{self.data['source']['model_id']}, {self.data['spec']['method']}, {self.ratio:.1%}"

    def summary(self) -> list[Row]:
        """Return the measured figures as rows of text: a figure's name, and its values before and after pruning."""
        rows = [
            self._row("parameters", self.data["parameters"], "{:,}"),
            self._row("weights (bytes)", self.data["weights_bytes"], "{:,}"),
            self._row("FLOPs of a 256-token prefill", self.data["flops"], "{:.3g}"),
            self._row("perplexity", self.data["perplexity"], "{:.2f}"),
        ]
        widths = self.data["widths"].items()
        layers = {when: sum(bool(own["heads"] or own["channels"]) for own in each) for when, each in widths}
        experts = {
            when: max((own.get("experts", 1) for own in each if own["channels"]), default=0) for when, each in widths
        }
        for name, pair in (("layers", layers), ("experts of a layer", experts)):
            if pair["before"] != pair["after"]:
                rows.append(self._row(name, pair, "{:,}"))
        for name, key, form in (
            ("tokens of the vocabulary", "vocabulary", "{:,}"),
            ("loss (nats a byte)", "nats_per_byte", "{:.4f}"),
        ):
            if self.data.get(key):
                rows.append(self._row(name, self.data[key], form))
        benchmarks = self.data.get("benchmarks") or {}
        rows += [
            self._row(f"perplexity, {name}", pair, "{:.2f}") for name, pair in benchmarks.get("perplexity", {}).items()
        ]
        rows += [
            self._row(f"{name} ({task['metric']})", task, "{:.1%}")
            for name, task in benchmarks.get("zero_shot", {}).items()
        ]
        if benchmarks.get("zero_shot_mean"):
            rows.append(self._row("mean accuracy", benchmarks["zero_shot_mean"], "{:.1%}"))
        for label, key in (("prefill (ms)", "prefill_ms"), ("decode (ms a token)", "decode_ms_per_token")):
            pair = {when: (self.data["latency"][when] or {}).get(key) for when in ("before", "after")}
            if None not in pair.values():
                rows.append(self._row(label, pair, "{:.1f}"))
        return rows

    @staticmethod
    def _row(name: str, pair: Mapping[str, Any], form: str) -> Row:
        before, after = ("infinite" if pair[when] is None else form.format(pair[when]) for when in ("before", "after"))
        return name, before, after

    def __repr__(self) -> str:
        return "\n".join([self.title, *(f"{name}: {before} -> {after}" for name, before, after in self.summary())])

    def _repr_markdown_(self) -> str:
        rows = [("", "before", "after"), ("---", "---:", "---:"), *self.summary()]
        return f"**{self.title}**\n\n" + "\n".join(f"| {' | '.join(row)} |" for row in rows)

    def _repr_html_(self) -> str:
        rows = "".join(f"<tr>{''.join(f'<td>{html.escape(cell)}</td>' for cell in row)}</tr>" for row in self.summary())
        head = "<tr><th></th><th>before</th><th>after</th></tr>"
        return f"<table><caption>{html.escape(self.title)}</caption><thead>{head}</thead><tbody>{rows}</tbody></table>"

    def plot_widths(self) -> "Figure":
        """Plot the heads and channels of every layer, before and after pruning."""

        def draw(axes: Sequence[Any]) -> None:
            for axis, (name, label) in zip(axes, (("heads", "heads"), ("channels", "channels")), strict=True):
                for when in ("before", "after"):
                    layers = self.data["widths"][when]
                    axis.bar([layer["layer"] for layer in layers], [layer[name] for layer in layers], 0.8, label=when)
                axis.set(xlabel="layer", ylabel=label)
            axes[0].legend()

        return _figure(draw, self.title, 2)

    def plot_perplexity(self) -> "Figure":
        """Plot the perplexity after each step; step 0 is the unpruned model."""

        def draw(axes: Sequence[Any]) -> None:
            values = [self.perplexity[0], *(each["perplexity"] for each in self.data["steps"])]
            axes[0].plot(range(len(values)), [float("nan") if value is None else value for value in values], marker="o")
            axes[0].set(xlabel="step", ylabel="perplexity", xticks=range(len(values)))

        return _figure(draw, self.title)

    def plot_loss(self) -> "Figure":
        """Plot the loss of the training by optimizer step.

        Raises:
            ValueError: The job had no training.
        """
        trained = [each["training"] for each in self.data["steps"] if "training" in each]
        if not trained:
            raise ValueError("this job had no training")

        def draw(axes: Sequence[Any]) -> None:
            losses = trained[-1]["loss"]
            axes[0].plot(range(1, len(losses) + 1), losses)
            axes[0].set(xlabel="step", ylabel="loss")

        return _figure(draw, f"{self.title}, {trained[-1]['kind']}")

    def plot_latency(self) -> "Figure":
        """Plot the prefill and decoding times before and after pruning.

        The error bars reach from the fastest repeat to the slowest repeat.

        Raises:
            ValueError: The job did not measure latency.
        """
        latency = self.data["latency"]
        if not latency["before"] or not latency["after"]:
            raise ValueError("this job did not measure latency")

        def draw(axes: Sequence[Any]) -> None:
            for axis, (key, label) in zip(
                axes, (("prefill_ms", "prefill (ms)"), ("decode_ms_per_token", "decode (ms a token)")), strict=True
            ):
                values = [latency[when][key] for when in ("before", "after")]
                spreads = [latency[when]["spread"][key] for when in ("before", "after")]
                low = [value - spread[0] for value, spread in zip(values, spreads, strict=True)]
                high = [spread[1] - value for value, spread in zip(values, spreads, strict=True)]
                axis.bar(["before", "after"], values, yerr=[low, high], capsize=4)
                axis.set(ylabel=label)

        return _figure(draw, self.title, 2)


def compare(reports: Sequence[Report]) -> "Figure":
    """Plot parameters against perplexity, and the front of the models that no other model beats in both figures."""
    points = sorted(
        {(report.parameters[index], report.perplexity[index]) for report in reports for index in (0, 1)},
        key=lambda point: (point[0], point[1] or float("inf")),
    )
    front: list[tuple[int, float]] = []
    for size, quality in points:
        if quality is not None and (not front or quality < front[-1][1]):
            front.append((size, quality))

    def draw(axes: Sequence[Any]) -> None:
        axes[0].plot(*zip(*front, strict=True), linestyle="--", color="grey", label="front")
        for report in reports:
            if report.perplexity[1] is not None:
                axes[0].scatter(report.parameters[1], report.perplexity[1], label=report.title)
        before = {
            (report.parameters[0], report.perplexity[0]) for report in reports if report.perplexity[0] is not None
        }
        axes[0].scatter(*zip(*sorted(before), strict=True), marker="s", color="black", label="unpruned")
        axes[0].set(xlabel="parameters", ylabel="perplexity")
        axes[0].legend()

    return _figure(draw, "Size and quality")


def _figure(draw: Callable[[Sequence[Any]], None], title: str, columns: int = 1) -> "Figure":
    require("eval", "Drawing a report", "matplotlib")
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.5 * columns, 3.6), layout="constrained")
    draw([figure.add_subplot(1, columns, at + 1) for at in range(columns)])
    figure.suptitle(title)
    return figure
