"""The picture of ``make bench-structures``: loss against parameters, file size and decode time."""

from collections.abc import Mapping, Sequence
from operator import itemgetter
from pathlib import Path

import matplotlib

matplotlib.use("svg")
from matplotlib import pyplot

AXES = {"parameters": "parameters", "bytes": "file size", "time": "decode time"}


def draw(curves: Mapping[str, Sequence[Mapping[str, float]]], path: Path, time: float) -> None:
    """Write the picture to ``path``; all axes but the loss are shares of the unpruned model's. ``time`` is marked."""
    matplotlib.rcParams["svg.hashsalt"] = "secateur"  # names in the file are the same in every run
    figure, panels = pyplot.subplots(1, len(AXES), figsize=(12, 4.2), sharey=True, layout="constrained")
    for panel, (quantity, title) in zip(panels, AXES.items(), strict=True):
        for name, curve in curves.items():
            points = sorted(curve, key=itemgetter(quantity))
            xs, ys = [point[quantity] for point in points], [point["loss"] for point in points]
            panel.plot(xs, ys, marker="o", markersize=4, label=name)
        panel.set_xlabel(f"{title}, share of the unpruned model's")
        panel.grid(alpha=0.3)
    panels[-1].axvline(time, linestyle=":", color="grey")
    panels[0].set_ylabel("loss over the unpruned model (nats per token)")
    panels[0].legend(fontsize=8)
    figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)
