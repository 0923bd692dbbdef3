"""``make bench-structures``: loss of width, depth, sub-layers and both against parameters, file size and decode time.

Every point is appended to ``structures.jsonl`` as soon as it is measured, so a run that was stopped continues after its last
point. ``structures.md`` and ``structures.svg`` show the points so far. ``--mixture`` removes experts of a small trained mixture.
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import common
from benchmarks.drawing import draw
from benchmarks.experts import measure_experts
from benchmarks.model import load_smollm2, model_file
from benchmarks.removal import SEARCH_WINDOWS, Search, remove
from benchmarks.table import NONE, excess_loss, markdown
from secateur.catalog.sources import locate
from secateur.catalog.spec import Calibration, Evaluation, PruningSpec
from secateur.engine.evaluation import perplexity
from secateur.engine.evaluation.latency import Protocol, measure_latency
from secateur.engine.export import fits_stock_class, write_model
from secateur.engine.measure.cache import Statistics
from secateur.engine.measure.texts import batch_windows, read_windows
from secateur.engine.model.decoder import Decoder

LENGTH = 128
TIME = 0.8
"""The decode time, as a share of the unpruned model's, at which the curves are compared."""
REPEATS = 5
ONCE = Protocol(decode_batch=1, decode_tokens=8, decode_prompt=32, repeats=1, prefill_tokens=32)
MOST_OF_BEST = 0.7
"""The aim: the combination loses at most this share of what the best single structure loses at the same decode time."""
LEAST_OFF = 1 / 3
"""The aim: compensation takes at least this share off the loss of plain dropping."""
HELD_OUT = "held out"
BOTH, BOTH_BY_INFLUENCE, WIDTH = "both", "both, shortgpt", "width"
PLAIN, COMPENSATED = "depth, shortgpt", "depth, shortgpt, compensated"
FITTED = {"recovery": {"layerwise": {"kind": "least-squares"}}}


@dataclass(frozen=True)
class Point:
    """A point of a curve: a request, and the search that names its layers if their order is shared between points."""

    curve: str
    ratio: float
    request: dict[str, Any]
    search: Search | None = None
    shares: dict[str, float] = field(default_factory=dict)

    @property
    def key(self) -> str:
        return json.dumps([self.curve, self.ratio, self.shares])

    @property
    def spec(self) -> PruningSpec:
        return PruningSpec.model_validate({"target_ratio": self.ratio, "shares": self.shares, **self.request})


def points() -> list[Point]:
    """Return all points, those first without which the curves cannot be compared."""
    both = {"method": "secateur", "structures": ["layers", "kv_groups", "channels"]}
    sublayers = {
        "method": "secateur",
        "structures": ["attention", "feed_forward"],
        "scoring": {"kind": "shortgpt"},
    }
    ours = {"method": "secateur", "structures": ["layers"]}

    def curve(name: str, ratios: Sequence[float], request: dict[str, Any], search: Search | None = None) -> list[Point]:
        return [Point(name, ratio, request, search) for ratio in ratios]

    return [
        *curve(WIDTH, [0.4, 0.5], {"method": "secateur"}),
        *curve(PLAIN, [0.2, 0.3], {"method": "shortgpt"}),
        *curve(COMPENSATED, [0.2, 0.3], {"method": "shortgpt", **FITTED}),
        *curve("depth, secateur", [0.2, 0.3], ours, "compensated-loss"),
        *(
            Point(BOTH, total, both, "compensated-loss", {"layers": share})
            for share, total in ((0.1, 0.3), (0.2, 0.3), (0.1, 0.2), (0.2, 0.4))
        ),
        *(
            Point(BOTH_BY_INFLUENCE, total, {**both, "scoring": {"kind": "shortgpt"}}, None, {"layers": share})
            for share, total in ((0.1, 0.3), (0.2, 0.3))
        ),
        *(
            Point("sub-layers", ratio, sublayers, None, {"attention": ratio / 4, "feed_forward": 3 * ratio / 4})
            for ratio in (0.2, 0.3)
        ),
        *curve("depth, sleb", [0.2, 0.3], {"method": "sleb"}, "sleb"),
        *curve(WIDTH, [0.2, 0.3], {"method": "secateur"}),
        *curve(PLAIN, [0.1], {"method": "shortgpt"}),
        *curve(COMPENSATED, [0.1], {"method": "shortgpt", **FITTED}),
        *curve("depth, secateur", [0.1], ours, "compensated-loss"),
        *curve("depth, sleb", [0.1], {"method": "sleb"}, "sleb"),
    ]


class Rows:
    """The file of the results, of one JSON object in each line; the first line is the settings that all lines share.

    Raises:
        SystemExit: the file has results of other settings, which cannot be compared.
    """

    def __init__(self, path: Path, settings: dict[str, Any]) -> None:
        self._path = path
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps({"settings": settings}) + "\n")
        first, *self.rows = [json.loads(line) for line in path.read_text().splitlines()]
        if first["settings"] != settings:
            raise SystemExit(f"{path} has results of other settings: move it away.")

    def get(self, kind: str, key: str) -> Any:
        return next((row["value"] for row in self.rows if (row["kind"], row["key"]) == (kind, key)), None)

    def kept(self, kind: str, key: str, measure: Callable[[], Any]) -> Any:
        """Return the value of a row, which is measured and appended if it is not there."""
        if (value := self.get(kind, key)) is None:
            value = measure()
            self.rows.append({"kind": kind, "key": key, "value": value})
            with self._path.open("a") as file:
                file.write(json.dumps(self.rows[-1]) + "\n")
        return value


def main() -> None:
    arguments = parse()
    began = time.monotonic()
    torch.set_num_threads(arguments.threads)
    texts = dict(pair.partition("=")[::2] for pair in arguments.evaluation)
    decoder = load_smollm2(arguments.dtype, "as-is")
    settings = common.settings(arguments, decoder.device.type) | {
        "samples": arguments.samples,
        "windows": arguments.windows,
        "length": LENGTH,
        "threads": arguments.threads,
        "texts": {name: Path(file).name for name, file in texts.items()},
    }
    rows = Rows(arguments.output / "structures.jsonl", settings)
    if arguments.mixture:
        rows.kept("mixture", "experts", measure_experts)
    calibration, windows = read(decoder, arguments, texts)
    unpruned = rows.kept("unpruned", "", lambda: {"perplexity": perplexities(decoder, windows), **sizes(decoder)})
    known = Statistics(None, {})
    for point in points():
        if (time.monotonic() - began) / 60 > arguments.budget:
            break

        def measure(point: Point = point) -> dict[str, Any]:
            started = time.monotonic()
            pruned = remove(decoder, point.spec, calibration, point.search, rows.kept, known)
            seconds = time.monotonic() - started
            found = {"perplexity": perplexities(pruned, windows), **sizes(pruned), **decode(decoder, pruned)}
            return {**found, "seconds": seconds, "load": os.getloadavg()[0]}

        found = rows.kept("point", point.key, measure)
        print(f"{point.key}: {mean_excess(found, unpruned):.3f}, {found['time']:.3f}", file=sys.stderr, flush=True)
    text = render(settings, rows)
    draw(curves(rows), arguments.output / "structures.svg", TIME)
    (arguments.output / "structures.md").write_text(text)
    print(text)


def parse() -> argparse.Namespace:
    made = argparse.ArgumentParser(prog="python -m benchmarks.structures", description=__doc__)
    made.add_argument("--calibration", default="wikitext2", help="a text file or data set; its last fifth is held out")
    made.add_argument("--evaluation", nargs="+", default=["c4=c4", "ptb=ptb"], help="NAME=text file or data set")
    made.add_argument("--samples", type=int, default=12, help=f"calibration windows of {LENGTH} tokens")
    made.add_argument("--windows", type=int, default=6, help=f"windows of {LENGTH} tokens of each measured text")
    made.add_argument("--budget", type=float, default=30, help="minutes after which no further point begins")
    made.add_argument("--mixture", action="store_true", help="also experts of a small mixture, trained for minutes")
    made.add_argument("--dtype", default="float32")
    made.add_argument("--threads", type=int, default=1)
    made.add_argument("--output", type=Path, default=Path("docs/benchmarks"))
    return made.parse_args()


def read(decoder: Decoder, arguments: argparse.Namespace, texts: dict[str, str]) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the calibration windows, and the measured windows of each text, the held-out part first."""
    asked = Calibration(dataset=arguments.calibration, samples=arguments.samples, sequence_length=LENGTH)
    windows = {}
    calibration = torch.empty(0)
    for name, file in {HELD_OUT: None, **texts}.items():
        measured = Evaluation(dataset=file, samples=arguments.windows, sequence_length=LENGTH)
        calibrated, evaluated = read_windows(decoder, asked, measured, 0, None, None, _quiet, allow_paths=True)
        windows[name] = evaluated.tokens
        if file is None:
            calibration = calibrated.tokens  # with another evaluation text, nothing is held out
    return calibration, windows


def perplexities(decoder: Decoder, windows: dict[str, Tensor]) -> dict[str, float]:
    return {name: perplexity(decoder, tokens, batch_windows(tokens), _quiet) for name, tokens in windows.items()}


def sizes(decoder: Decoder) -> dict[str, int]:
    """Return the parameters of the model, and the bytes of its weight files in the layout ``per-layer``."""
    with tempfile.TemporaryDirectory() as folder:
        source = locate(str(model_file()), allow_paths=True)
        write_model(decoder, source, Path(folder), fits_stock_class(decoder))
        return {
            "parameters": decoder.parameters,
            "bytes": sum(file.stat().st_size for file in Path(folder).glob("*.safetensors")),
        }


def decode(decoder: Decoder, pruned: Decoder) -> dict[str, Any]:
    """Return the pruned model's decode time as a share of the unpruned model's: medians of repeats that alternate."""
    taken: tuple[list[float], list[float]] = ([], [])
    for _ in range(REPEATS):
        for model, times in zip((decoder, pruned), taken, strict=True):
            times.append(measure_latency(model, ONCE).decode_ms_per_token)
    plain, own = (statistics.median(times) for times in taken)
    return {"time": own / plain, "unpruned_ms": plain, "repeats": [b / a for a, b in zip(*taken, strict=True)]}


def excesses(found: dict[str, Any], unpruned: dict[str, Any]) -> dict[str, float]:
    """Return the loss in nats over the unpruned model's, by text."""
    return {name: excess_loss(own, unpruned["perplexity"][name]) for name, own in found["perplexity"].items()}


def mean_excess(found: dict[str, Any], unpruned: dict[str, Any]) -> float:
    return statistics.fmean(excesses(found, unpruned).values())


Curves = dict[str, list[dict[str, float]]]
"""For each curve, its points by ascending decode time: ``time``, ``loss``, ``parameters`` and ``bytes``, shares of the unpruned
model's but for the loss; the unpruned model is the last point."""


def curves(rows: Rows) -> Curves:
    unpruned = rows.get("unpruned", "")
    made: Curves = {}
    for point in points():
        if found := rows.get("point", point.key):
            shares = {name: found[name] / unpruned[name] for name in ("parameters", "bytes")}
            own = {"time": found["time"], "loss": mean_excess(found, unpruned), **shares}
            made.setdefault(point.curve, []).append(own)
    whole = {"time": 1.0, "loss": 0.0, "parameters": 1.0, "bytes": 1.0}
    return {name: sorted([*own, whole], key=lambda each: each["time"]) for name, own in made.items()}


def loss_at(curve: Sequence[dict[str, float]], share: float) -> float | None:
    """Return the loss at a decode time, linear between neighbouring points; ``None`` outside of what was measured.

    Where a curve passes the decode time between several pairs of points, the least loss counts.
    """
    found = []
    for one, other in pairwise(curve):
        if one["time"] <= share <= other["time"]:
            gap = other["time"] - one["time"]
            weight = (share - one["time"]) / gap if gap else 0.0
            found.append(one["loss"] + weight * (other["loss"] - one["loss"]))
    return min(found, default=None)


def render(settings: dict[str, Any], rows: Rows) -> str:
    unpruned, lines, loads = rows.get("unpruned", ""), [], []
    missing: list[str] = []
    for point in sorted(points(), key=lambda each: (each.curve, each.ratio)):
        label = f"{point.ratio:.0%}" + "".join(f", {name} {share:.1%}" for name, share in point.shares.items())
        if not (found := rows.get("point", point.key)):
            missing.append(f"{point.curve} {label}")
            continue
        loads.append(found["load"])
        parts = excesses(found, unpruned)
        lines.append(
            [
                point.curve,
                label,
                f"{found['parameters'] / 1e6:.1f} M",
                f"{found['bytes'] / 2**20:.0f} MiB",
                f"{found['time']:.3f} ({min(found['repeats']):.3f} to {max(found['repeats']):.3f})",
                *(f"{value:.3f}" for value in parts.values()),
                f"{statistics.fmean(parts.values()):.3f}",
            ]
        )
    texts = list(unpruned["perplexity"])
    heads = ["curve", "ratio", "parameters", "file", "decode time", *texts, "mean"]
    load = f"{min(loads):.1f} to {max(loads):.1f}" if loads else NONE
    return f"""# Structures

`make bench-structures`: {settings["model"]}, {settings["dtype"]} on {settings["device"]}, number of threads: {settings["threads"]}, \
load average at the points {load}. Calibrated on {settings["samples"]} × {LENGTH} tokens of {settings["calibration"]}; measured on \
{settings["windows"]} × {LENGTH} tokens of the held-out part of this text, and of \
{", ".join(f"{file} ({name})" for name, file in settings["texts"].items())}. The unpruned model has {unpruned["parameters"] / 1e6:.1f} M \
parameters and a file of {unpruned["bytes"] / 2**20:.0f} MiB. Every point is of one seed. The calibration is small so that the whole \
benchmark is short, and a search for layers reads {SEARCH_WINDOWS} of its windows; methods that fit many weights, as the widths do, lose \
less with more of it (see [quality](quality.md)).

| column | meaning |
| --- | --- |
| ratio | share of the parameters of the blocks' projections that is removed, and the part of it that whole units give |
| decode time | of a token at batch 1, as a share of the unpruned model's: medians of {REPEATS} repeats that alternate between both models; in brackets, the smallest and the largest ratio of two neighbouring repeats |
| {", ".join(texts)}; mean | loss on each text in nats over the unpruned model; mean over the texts |

`width` is the method `secateur`; `depth, secateur` chooses layers by measured loss, and compensates for them; `depth, sleb` chooses them \
by measured loss and drops them, which is also what `secateur` does with `recovery.layerwise.kind` `none`; `depth, shortgpt` drops layers by \
their influence. `sub-layers` are chosen by influence and compensated for. `both` removes the layers of `depth, secateur`, and then widths; \
`both, shortgpt` does so with the layers of `depth, shortgpt, compensated`. The aim is judged by `both`: the other combination was added \
after single structures had been measured.

{markdown(heads, lines)}

Not measured: {"; ".join(missing) or "nothing of these curves"}. The vocabulary is not part of this benchmark.

![Loss against parameters, file size and decode time](structures.svg)

{_at_equal_time(curves(rows))}

{_compensation(rows)}

{_experts(rows.get("mixture", "experts"))}

{common.versions_line(settings)}
"""


def _at_equal_time(made: Curves) -> str:
    """Compare the curves at the same decode time."""
    found = {name: loss_at(curve, TIME) for name, curve in made.items()}
    table = markdown(
        ["curve", "mean loss"], [[name, NONE if loss is None else f"{loss:.3f}"] for name, loss in found.items()]
    )
    single = {name: loss for name, loss in found.items() if name not in (BOTH, BOTH_BY_INFLUENCE) and loss is not None}
    both = found.get(BOTH)
    if both is None or not single:
        verdict = "The aim is not decided: the combination, or every single structure, has no points on both sides."
    else:
        name = min(single, key=single.__getitem__)
        share = both / single[name]
        met = "met" if share <= MOST_OF_BEST else "not met"
        verdict = f"The aim is {met}: the combination loses {share:.2f} times what the best measured single structure ({name}) loses."
    return f"""## At equal decode time

The loss at decode time {TIME:g}, read linearly between the measured points of each curve, of which the unpruned model is the last; where \
a curve passes this time more than once, the least loss counts. A dash means that the curve has no points on both sides. A decode time is \
uncertain by several hundredths, as the brackets of the first table and points of equal size show, and so is what is read here. The aim is that the combination loses at most {MOST_OF_BEST:g} times what the best single structure loses.

{table}

{verdict}"""


def _compensation(rows: Rows) -> str:
    """Compare dropping with and without compensation of the same layers."""
    unpruned, lines, offs = rows.get("unpruned", ""), [], []
    for point in points():
        if point.curve != PLAIN:
            continue
        plain = rows.get("point", point.key)
        fitted = rows.get("point", Point(COMPENSATED, point.ratio, {}).key)
        if plain and fitted:
            before, after = mean_excess(plain, unpruned), mean_excess(fitted, unpruned)
            offs.append(1 - after / before)
            lines.append([f"{point.ratio:.0%}", f"{before:.3f}", f"{after:.3f}", f"{offs[-1]:.0%}"])
    if not lines:
        return "## Compensation\n\nNot measured."
    reached = sum(off >= LEAST_OFF for off in offs)
    verdict = "met" if reached == len(offs) else f"met at {reached} of {len(offs)} ratios" if reached else "not met"
    return f"""## Compensation

The same layers, chosen by influence, without and with compensation. The aim is that compensation takes at least a third off the loss of \
plain dropping.

{markdown(["ratio", "plain", "compensated", "taken off"], lines)}

The aim is {verdict}."""


def _experts(found: dict[str, Any] | None) -> str:
    if found is None:
        return "## Experts of a mixture\n\nNot measured; `OPTIONS=--mixture` measures it."
    lines = [[row["scores"], row["removed"], f"{row['loss']:.3f}", row["spread"]] for row in found["rows"]]
    return f"""## Experts of a mixture

{found["model"]} Its loss on held-out text is {found["unpruned"]:.3f} nats per token.

{markdown(["scores", "experts removed", "loss over the unpruned model", "smallest to largest"], lines)}"""


def _quiet(share: float) -> None:
    """Report nothing: the benchmark reports progress after each point."""


if __name__ == "__main__":
    main()
