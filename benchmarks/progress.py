"""``make bench-progress``: the reported time left against the real time left. Writes ``progress.json`` and ``progress.md``."""

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.model import MODEL, model_file
from benchmarks.table import markdown
from secateur.catalog.methods import STATIC_METHODS
from secateur.catalog.spec import PruningSpec
from secateur.contract.events import Event, ProgressEvent, StepEvent
from secateur.engine.run.run import NamedModel, prune_to_folder
from secateur.engine.run.workspace import Listener

DEMO = Path(__file__).parents[1] / "demo"
LEAST = 5.0
"""Reports with less than these seconds left are not compared: there, one second is a large factor."""
AIM = 1.5


def main() -> None:
    arguments = parse()
    torch.set_num_threads(arguments.threads)
    runs = [{"method": method, "rounds": rounds} for rounds in arguments.rounds for method in arguments.methods]
    runs += [
        {"method": "flap", "rounds": 1, "target_ratio": [0.2, 0.4]},
        {"method": "dsgp", "rounds": 1},
        {"method": "flap", "rounds": 1, "recovery": {"training": {"kind": "lora", "epochs": 1, "batch_size": 8}}},
    ]
    found = [{"run": run, "factors": measure(run, arguments.samples)} for run in runs]
    settings = {"model": MODEL, "threads": arguments.threads, "samples": arguments.samples}
    (arguments.output / "progress.json").write_text(
        json.dumps({"settings": settings, "results": found}, indent=1) + "\n"
    )
    text = render(settings, found)
    (arguments.output / "progress.md").write_text(text)
    print(text)


def parse() -> argparse.Namespace:
    made = argparse.ArgumentParser(prog="python -m benchmarks.progress", description=__doc__)
    made.add_argument("--methods", nargs="+", choices=STATIC_METHODS, default=STATIC_METHODS, metavar="METHOD")
    made.add_argument("--rounds", type=int, nargs="+", default=[1, 3])
    made.add_argument("--samples", type=int, default=16, help="calibration windows of 128 tokens")
    made.add_argument("--threads", type=int, default=1)
    made.add_argument("--output", type=Path, default=Path("docs/benchmarks"))
    return made.parse_args()


def measure(run: dict[str, Any], samples: int) -> list[float]:
    """Return, for each report of the time left after the first round, the factor between the reported and the real time left."""
    texts = {"samples": samples, "sequence_length": 128}
    asked = {
        "target_ratio": 0.3,
        "dtype": "bfloat16",
        "calibration": {**texts, "texts": _texts("calibration")},
        "evaluation": {**texts, "texts": _texts("evaluation")},
        **run,
    }
    told: list[tuple[float, float]] = []
    first = False

    def note(event: Event) -> None:
        nonlocal first
        first = first or (isinstance(event, StepEvent) and event.step.number == 1)
        if first and isinstance(event, ProgressEvent) and event.remaining_seconds is not None:
            told.append((time.monotonic(), event.remaining_seconds))

    with tempfile.TemporaryDirectory() as folder:
        model, spec = NamedModel(str(model_file())), PruningSpec.model_validate(asked)
        prune_to_folder(model, spec, Path(folder) / "out", listener=Listener(on_event=note))
    ended = time.monotonic()
    pairs = [(left, ended - at) for at, left in told if ended - at >= LEAST]
    factors = [max(left / real, real / max(left, 0.1)) for left, real in pairs]
    print(run, f"worst {max(factors):.2f}" if factors else "nothing to compare", flush=True)
    return factors


def _texts(part: str) -> list[str]:
    return [file.read_text() for file in sorted((DEMO / part).glob("*.txt"))]


def render(settings: dict[str, Any], found: list[dict[str, Any]]) -> str:
    rows = []
    for each in found:
        run, factors = each["run"], each["factors"]
        more = ", ".join(f"{name} {value}" for name, value in run.items() if name not in ("method", "rounds"))
        cells = [f"{statistics.median(factors):.2f}", f"{max(factors):.2f}"] if factors else ["–", "–"]
        rows.append([run["method"], str(run["rounds"]), more, *cells, str(len(factors))])
    late = [each for each in found if each["factors"] and max(each["factors"]) > AIM]
    return f"""# Time left

{settings["model"]}, {settings["samples"]} windows of 128 tokens, number of threads: {settings["threads"]}. The table shows the factor \
between the reported time left and the real time left. It covers the reports from the end of the first round on, while {LEAST:g} s or \
more are left. In {len(found) - len(late)} of {len(found)} runs, the factor never exceeds {AIM:g}.

{markdown(["method", "rounds", "", "median", "worst", "reports"], rows)}
"""


if __name__ == "__main__":
    main()
