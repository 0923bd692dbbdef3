"""``make bench-paper``: the tables of the papers on SmolLM2-135M, beside the printed numbers.

Writes ``paper.json`` and ``paper.md``. A run that was stopped continues after its last result.
"""

import argparse
import copy
import os
import statistics
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks import common
from benchmarks.case import Case, prune, read_texts
from benchmarks.model import load_smollm2
from benchmarks.printed import LATENCY, SLIMLLM, TABLES, TASKS, TEXTS, Line, Table
from benchmarks.results import Results
from benchmarks.table import NONE, markdown
from secateur.catalog.spec import Evaluation
from secateur.engine.evaluation import Suite
from secateur.engine.evaluation.latency import Protocol, measure_latency
from secateur.engine.measure.cache import Statistics
from secateur.engine.measure.texts import read_texts as read_named
from secateur.engine.model.decoder import Decoder

UNPRUNED = "unpruned"


def main() -> None:
    arguments = parse()
    torch.set_num_threads(arguments.threads)
    decoder = load_smollm2(arguments.dtype, "repeated")
    texts = dict(pair.partition("=")[::2] for pair in arguments.texts)
    evaluation = Evaluation(
        perplexity=list(texts.values()), zero_shot=arguments.tasks, limit=arguments.limit, prompts=[], latency=False
    )
    named = read_named(decoder, evaluation, None, None, allow_paths=True)
    suite = Suite(evaluation, {name: named[file] for name, file in texts.items()}, arguments.tasks_dir)
    settings = common.settings(arguments, str(decoder.device)) | {
        "texts": {name: Path(file).name for name, file in texts.items()},
        "tasks": sorted(arguments.tasks),
        "limit": arguments.limit,
        "threads": arguments.threads,
    }
    results = Results(arguments.output / "paper.json", settings)
    cases = list(
        {case.key: case for table in TABLES for line in table.lines if (case := case_of(table, line))}.values()
    )
    for number, case in enumerate(cases, start=1):
        if results.get(case) is None:
            results.add(case, run(decoder, case, suite, arguments))
            print(f"{number}/{len(cases)} {case.method} {case.ratio:g} {case.changes or ''}", flush=True)
            (arguments.output / "paper.md").write_text(render(settings, results))
    if arguments.latency:
        for ratio, *_ in LATENCY:
            case = Case("slimllm", ratio, 1, 0, "repeated", **_windows(SLIMLLM), changes={"timed": arguments.repeats})
            if results.get(case) is None:
                results.add(case, time_decoding(decoder, case, arguments))
    text = render(settings, results)
    (arguments.output / "paper.md").write_text(text)
    print(text)


def parse() -> argparse.Namespace:
    made = common.parser("paper", __doc__, "bfloat16")
    made.add_argument(
        "--texts",
        nargs="+",
        default=[f"{name}={name}" for name in TEXTS],
        metavar="NAME=TEXT",
        help="measure perplexity on these texts",
    )
    made.add_argument("--tasks", nargs="+", default=list(TASKS), choices=TASKS, metavar="TASK")
    made.add_argument("--tasks-dir", type=Path, help="folder of files TASK.jsonl; unset: data sets of the Hub")
    made.add_argument("--limit", type=int, default=None, help="examples of each task, windows of each text; unset: all")
    made.add_argument("--threads", type=int, default=os.cpu_count())
    made.add_argument(
        "--latency", action="store_true", help="also measure SlimLLM's table 3: half an hour on an idle machine"
    )
    made.add_argument("--repeats", type=int, default=20, help="repeats of table 3")
    return made.parse_args()


def _windows(settings: Mapping[str, int]) -> dict[str, int]:
    return {name: settings[name] for name in ("samples", "sequence_length")}


def case_of(table: Table, line: Line) -> Case:
    """Return the pruning that reproduces ``line``. For the unpruned model, its ratio is 0."""
    rounds = table.settings["rounds"] if line.method else 1
    windows = _windows(table.settings if line.method else SLIMLLM)
    return Case(line.method or UNPRUNED, line.ratio, rounds, 0, "repeated", changes=dict(line.changes), **windows)


def run(decoder: Decoder, case: Case, suite: Suite, arguments: argparse.Namespace) -> dict[str, Any]:
    """Prune a copy of ``decoder`` and measure the columns of the tables."""
    began = time.monotonic()
    pruned = pruned_by(decoder, case, arguments)
    seconds = time.monotonic() - began
    found = suite.measure(pruned, lambda share: None).benchmarks
    assert found is not None
    removed = sum(layer.shape.kv_groups + layer.shape.channels for layer in pruned.layers)
    units = sum(layer.kv_groups + layer.channels for layer in decoder.shape.layers)
    return {
        **found.model_dump(mode="json"),
        "redundancy": 1 - removed / units,
        "latency": measure_latency(pruned).decode_ms_per_token,
        "seconds": seconds,
    }


def pruned_by(decoder: Decoder, case: Case, arguments: argparse.Namespace) -> Decoder:
    """Return a copy of ``decoder`` that is pruned as ``case`` says."""
    pruned = Decoder(copy.deepcopy(decoder.model), decoder.tokenizer, decoder.shape)
    if case.ratio:
        calibration, _ = read_texts(decoder, case, arguments.calibration, arguments.calibration)
        prune(pruned, decoder, case, calibration.tokens, Statistics(None, {}))
    return pruned


def time_decoding(decoder: Decoder, case: Case, arguments: argparse.Namespace) -> dict[str, Any]:
    plain = Case(case.method, case.ratio, case.rounds, case.seed, case.kv_heads, case.samples, case.sequence_length)
    pruned = pruned_by(decoder, plain, arguments)
    protocol = Protocol(decode_batch=8, decode_tokens=256, decode_prompt=1, repeats=arguments.repeats)
    return {**measure_latency(pruned, protocol).model_dump(mode="json"), "parameters": pruned.parameters}


def render(settings: dict[str, Any], results: Results) -> str:
    parts = [
        f"# The papers' tables on a small model\n\n`make bench-paper`: {settings['model']}, {settings['dtype']}, calibrated on "
        f"{settings['calibration']}. Each KV head is copied for its query heads. {settings['limit'] or 'All'} examples of each "
        f"task and {settings['limit'] or 'all'} windows of 128 tokens of each text are measured. The library lm-eval scores the "
        "tasks, with the better known of its metrics (docs/evaluation.md).\n\nA row that begins with *printed* is what the "
        "paper prints for its own model; the mean in such a row is over the tasks that were measured here. A dash means: not "
        "measured here, or not in the paper.",
        *(_table(table, settings, results) for table in TABLES),
        _latencies(results),
        common.versions_line(settings),
    ]
    return "\n\n".join(parts) + "\n"


def _table(table: Table, settings: dict[str, Any], results: Results) -> str:
    tasks = settings["tasks"]
    unpruned = results.get(case_of(table, Line(UNPRUNED, None, 0.0, ())))
    columns = [
        column for column in table.columns if column not in (*TEXTS, *TASKS) or column in (*settings["texts"], *tasks)
    ]
    rows = []
    for line in table.lines:
        result = results.get(case_of(table, line))
        label = f"{line.label}, {line.ratio:.0%}" if line.method and "%" not in line.label else line.label
        rows.append([label, *(_cell(column, _value(column, result, unpruned, tasks)) for column in columns)])
        printed = dict(zip(table.columns, line.printed, strict=False))
        if set(tasks) <= printed.keys() and "mean" in printed:
            printed["mean"] = statistics.fmean(printed[task] or 0.0 for task in tasks)
        if any(value is not None for value in printed.values()):
            rows.append([f"*printed*, {table.model}", *(_cell(column, printed.get(column)) for column in columns)])
    return f"## {table.title}\n\n{markdown(['', *columns], rows)}\n\n{table.differs}"


def _value(
    column: str, result: dict[str, Any] | None, unpruned: dict[str, Any] | None, tasks: Sequence[str]
) -> float | None:
    """Return the value of ``column`` in the unit of the tables: percent, perplexity, or milliseconds per token."""
    if result is None:
        return None
    accuracies = {name: 100 * result["zero_shot"][name]["value"] for name in tasks}
    match column:
        case "mean":
            return statistics.fmean(accuracies.values())
        case "retained":
            before = unpruned and statistics.fmean(unpruned["zero_shot"][name]["value"] for name in tasks)
            return statistics.fmean(accuracies.values()) / before if before else None
        case "redundancy":
            return 100 * float(result["redundancy"])
        case "latency":
            return float(result["latency"])
    return accuracies[column] if column in accuracies else result["perplexity"].get(column)


def _cell(column: str, value: float | None) -> str:
    if value is None:
        return NONE
    return f"{value:.2f}" if column in TEXTS and value < 1000 else f"{value:.1f}"


def _latencies(results: Results) -> str:
    rows, timed = [], [row for row in results.cases() if "timed" in row.changes]
    for case in timed:
        found = results.get(case)
        printed = next((line for line in LATENCY if line[0] == case.ratio), None)
        if found is None or printed is None:
            continue
        low, high = found["spread"]["decode_ms_per_token"]
        whole = found["decode_tokens"] / 1000
        rows.append(
            [
                f"{case.ratio:.0%}",
                f"{found['parameters'] / 1e6:.0f} M",
                f"{found['prefill_ms'] / 1000:.4f}",
                f"{printed[1]:.4f}",
                f"{found['decode_ms_per_token'] * whole:.2f} ({low * whole:.2f} to {high * whole:.2f})",
                f"{printed[2]:.2f}",
            ]
        )
    heads = [
        "ratio",
        "parameters",
        "prefill (s)",
        "printed, LLaMA-7B",
        "256 tokens at batch 8 (s)",
        "printed, LLaMA-7B",
    ]
    told = markdown(heads, rows) if rows else "Not measured in this run; `OPTIONS=--latency` measures it."
    return (
        f"## SlimLLM, table 3\n\n{told}\n\nOur figures are medians of the repeats; the paper prints means on a V100. In the paper, "
        "a prefill takes half as long after 20 % of the parameters are removed. A fifth less work cannot explain this: kernels "
        "of other sizes must have been chosen."
    )


if __name__ == "__main__":
    main()
