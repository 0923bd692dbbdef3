"""Reports in notebooks: what is drawn and written, against the data."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.container import BarContainer
from matplotlib.figure import Figure

from secateur.client import Report, compare


def report(after: int = 80, perplexity: float | None = 12.0, **changes: Any) -> Report:
    widths = {
        "before": [{"layer": at, "heads": 8, "channels": 32} for at in range(3)],
        "after": [{"layer": at, "heads": 8 - at, "channels": 16 + at} for at in range(3)],
    }
    speed = {
        "prefill_ms": 10.0,
        "decode_ms_per_token": 4.0,
        "spread": {"prefill_ms": [9.0, 13.0], "decode_ms_per_token": [4.0, 5.0]},
    }
    return Report(
        {
            "source": {"model_id": "org/<b>"},
            "spec": {"method": "flap"},
            "ratio": {"reached": 0.2},
            "parameters": {"before": 100, "after": after},
            "weights_bytes": {"before": 200, "after": 160},
            "flops": {"before": 1e9, "after": 8e8},
            "perplexity": {"before": 10.0, "after": perplexity},
            "latency": {"before": speed, "after": speed},
            "widths": widths,
            "steps": [
                {"perplexity": 11.0},
                {"perplexity": perplexity, "training": {"kind": "lora", "loss": [3.0, 2.5]}},
            ],
            "benchmarks": {
                "perplexity": {"ptb": {"before": 20.0, "after": 30.0}},
                "zero_shot": {"piqa": {"metric": "acc", "before": 0.5, "after": 0.45}},
                "zero_shot_mean": {"before": 0.5, "after": 0.45},
            },
            "retained_accuracy": 0.9,
            **changes,
        }
    )


def heights(figure: Figure, axis: int) -> list[list[float]]:
    return [
        [bar.get_height() for bar in bars] for bars in figure.axes[axis].containers if isinstance(bars, BarContainer)
    ]


def test_figures_by_name(tmp_path: Path) -> None:
    (tmp_path / "report.json").write_text(json.dumps(report().data))
    found = Report.load(tmp_path / "report.json")
    assert (found.ratio, found.parameters, found.perplexity, found.retained_accuracy) == (
        0.2,
        (100, 80),
        (10.0, 12.0),
        0.9,
    )
    assert ("piqa (acc)", "50.0%", "45.0%") in found.summary() and (
        "perplexity, ptb",
        "20.00",
        "30.00",
    ) in found.summary()
    assert "| perplexity | 10.00 | 12.00 |" in found._repr_markdown_()
    assert "&lt;b&gt;" in found._repr_html_() and "<b>" not in found._repr_html_()
    assert ("perplexity", "10.00", "infinite") in report(perplexity=None).summary()


def test_what_went_whole_has_rows_of_its_own() -> None:
    names = {row[0] for row in report().summary()}
    assert not names & {"layers", "experts of a layer", "tokens of the vocabulary", "loss (nats a byte)"}
    layer = {"heads": 8, "channels": 16, "experts": 4}
    gone = {"heads": 0, "channels": 0, "experts": 4}
    found = report(
        widths={"before": [layer] * 3, "after": [layer | {"experts": 3}, gone, layer | {"experts": 3}]},
        vocabulary={"before": 1000, "after": 640},
        nats_per_byte={"before": 0.9, "after": None},
    ).summary()
    assert ("layers", "3", "2") in found and ("experts of a layer", "4", "3") in found
    assert ("tokens of the vocabulary", "1,000", "640") in found and (
        "loss (nats a byte)",
        "0.9000",
        "infinite",
    ) in found


def test_plots_draw_the_data() -> None:
    found = report()
    assert heights(found.plot_widths(), 0) == [[8, 8, 8], [8, 7, 6]] and heights(found.plot_widths(), 1)[1] == [
        16,
        17,
        18,
    ]
    assert np.asarray(found.plot_perplexity().axes[0].lines[0].get_ydata()).tolist() == [10.0, 11.0, 12.0]
    assert np.asarray(found.plot_loss().axes[0].lines[0].get_ydata()).tolist() == [3.0, 2.5]
    assert heights(found.plot_latency(), 0) == [[10.0, 10.0]]
    with pytest.raises(ValueError, match="no training"):
        report(steps=[{"perplexity": 11.0}]).plot_loss()
    with pytest.raises(ValueError, match="latency"):
        report(latency={"before": None, "after": None}).plot_latency()


def test_the_front_joins_what_nothing_beats() -> None:
    figure = compare([report(80, 12.0), report(60, 11.0), report(50, 20.0), report(90, None)])
    [front] = figure.axes[0].lines
    assert [tuple(point) for point in np.asarray(front.get_xydata())] == [(50, 20.0), (60, 11.0), (100, 10.0)]
