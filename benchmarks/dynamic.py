"""``make bench-dynamic``: dynamically pruned models against statically pruned models with the same work per token.

Writes ``dynamic.json`` and ``dynamic.md``.
"""

import argparse
import copy
import json
import math
import statistics
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import common
from benchmarks.case import Case, prune
from benchmarks.model import load_smollm2, model_file
from benchmarks.table import NONE, markdown
from secateur.catalog.resolve import resolve
from secateur.catalog.sources import locate
from secateur.catalog.spec import Calibration, Evaluation, PruningSpec
from secateur.engine.dynamic.calibrate import kept_units, priors
from secateur.engine.dynamic.pruner import write_dynamic
from secateur.engine.dynamic.runtime import Runtime
from secateur.engine.evaluation import perplexity
from secateur.engine.evaluation.latency import now
from secateur.engine.evaluation.zero_shot import zero_shot
from secateur.engine.measure.cache import Statistics
from secateur.engine.measure.texts import batch_windows, read_windows
from secateur.engine.model.decoder import Decoder
from secateur.engine.scoring import Context

READ, LENGTH = 256, 512
"""Number of tokens of a prompt, and of the prompt with its continuation."""
STEPS = 32
BATCHES = (1, 8)


def main() -> None:
    arguments = parse()
    torch.set_num_threads(arguments.threads)
    decoder = load_smollm2(arguments.dtype, "as-is")
    decoder.read_share = READ / LENGTH
    texts = dict(pair.partition("=")[::2] for pair in arguments.evaluation)
    calibration = _windows(decoder, arguments.calibration, arguments.samples)
    windows = {name: _windows(decoder, file, arguments.windows) for name, file in texts.items()}

    def measure(model: Decoder, tasks: bool = False) -> dict[str, Any]:
        found: dict[str, Any] = {
            "loss": {
                name: math.log(perplexity(model, tokens, batch_windows(tokens), _quiet))
                for name, tokens in windows.items()
            }
        }
        if tasks and arguments.tasks:
            scored = zero_shot(model, arguments.tasks, arguments.tasks_dir, arguments.limit, _quiet)
            found["tasks"] = {name: task.value for name, task in scored.items()}
        return found

    results: list[dict[str, Any]] = []

    def add(ratio: float, name: str, found: dict[str, Any]) -> None:
        results.append({"ratio": ratio, "name": name, **found})
        print(f"{ratio:g} {name} {found['loss']}", flush=True)

    add(0.0, "unpruned", measure(decoder, tasks=True))
    for ratio in arguments.ratios:
        pruned = copy.deepcopy(decoder)
        case = Case("secateur", ratio, 1, 0, "as-is", arguments.samples, LENGTH)
        prune(pruned, decoder, case, calibration, Statistics(None, {}))
        add(ratio, "secateur, static", measure(pruned, tasks=True))
        del pruned
        with tempfile.TemporaryDirectory() as folder:
            runtime = _dynamic(decoder, ratio, calibration, Path(folder))
            settings = runtime.model.config.dynamic_pruning
            chosen = settings["prior_weight"]
            costs = {"prior_weight": chosen, "cost": _cost(runtime, calibration)}
            add(ratio, "dsgp", {**measure(runtime, tasks=True), **costs})
            for name, weight in (("prior only", 1.0), ("prompt only", 0.0)):
                settings["prior_weight"] = weight
                add(ratio, name, measure(runtime))
            settings["prior_weight"] = chosen
            for layer in runtime.model._priors():
                layer["channels"].pop("factor")
            add(ratio, "without compensation", measure(runtime))
            runtime.model._choose = partial(_drawn, torch.Generator().manual_seed(0))
            add(ratio, "random units", measure(runtime))
    found = {"settings": _settings(arguments, decoder, texts), "results": results}
    (arguments.output / "dynamic.json").write_text(json.dumps(found, indent=1) + "\n")
    text = render(found)
    (arguments.output / "dynamic.md").write_text(text)
    print(text)


def parse() -> argparse.Namespace:
    made = common.parser("dynamic", __doc__, "bfloat16")
    made.add_argument("--evaluation", nargs="+", default=["wikitext2=wikitext2"], help="NAME=text file or data set")
    made.add_argument("--windows", type=int, default=16, help=f"windows of {LENGTH} tokens from each text")
    made.add_argument("--ratios", type=float, nargs="+", default=[0.2, 0.4, 0.5])
    made.add_argument("--tasks", nargs="*", default=[], help="zero-shot tasks, see docs/evaluation.md")
    made.add_argument("--tasks-dir", type=Path)
    made.add_argument("--limit", type=int, default=100, help="examples of each task")
    made.add_argument("--threads", type=int, default=1)
    return made.parse_args()


def _settings(arguments: argparse.Namespace, decoder: Decoder, texts: dict[str, str]) -> dict[str, Any]:
    return common.settings(arguments, str(decoder.device)) | {
        "texts": {name: Path(file).name for name, file in texts.items()},
        "windows": arguments.windows,
        "samples": arguments.samples,
        "limit": arguments.limit,
        "threads": arguments.threads,
    }


def _windows(decoder: Decoder, text: str, samples: int) -> Tensor:
    asked = {"dataset": text, "samples": samples, "sequence_length": LENGTH}
    found, _ = read_windows(decoder, Calibration(**asked), Evaluation(**asked), 0, None, None, _quiet, allow_paths=True)
    return found.tokens


def _dynamic(decoder: Decoder, ratio: float, tokens: Tensor, folder: Path) -> Runtime:
    """Write the checkpoint that a job would write into ``folder``, and return it loaded."""
    spec = PruningSpec(method="dsgp", target_ratio=ratio)
    resolved = resolve(spec, decoder.shape, config={}, source_dtype=str(decoder.model.dtype).removeprefix("torch."))
    kept = kept_units(Context(decoder, tokens, batch_windows(tokens), resolved, ratio, 1, _quiet))
    known = priors(decoder, tokens, batch_windows(tokens), 0, _quiet)
    settings = {"enabled": True, "kept": kept, **spec.dynamic.model_dump()}
    write_dynamic(decoder, locate(str(model_file()), allow_paths=True), folder, known, settings)
    runtime = Runtime(decoder, folder, kept)
    runtime.choose_prior_weight(tokens)
    return runtime


def _drawn(
    generator: torch.Generator, _: Any, index: int, part: str, prior: dict[str, Tensor], width: int, settings: Any
) -> Tensor:
    """Choose units at random; this replaces the choice of the model."""
    return torch.randperm(len(prior["energy"]), generator=generator)[None, :width].sort(1).values


@torch.no_grad()
def _cost(runtime: Runtime, tokens: Tensor) -> dict[str, Any]:
    """Measure the cost of dynamic pruning; times are medians over repeats that alternate between the plain and the dynamic model.

    The result has the seconds of a prefill without and with measuring, of choosing and gathering, and of a generated token
    by the plain and the dynamic model; the FLOPs of a generated token by torch's counter; and the bytes that are gathered.
    """
    model, settings = runtime.model, runtime.model.config.dynamic_pruning
    prompt = tokens[:1, :READ]
    seconds: dict[str, list[float]] = {}

    def timed(name: str, work: Callable[..., Any], *arguments: Any) -> Any:
        began = now(runtime.device)
        done = work(*arguments)
        seconds.setdefault(name, []).append(now(runtime.device) - began)
        return done

    def write(cache: Any, batch: int) -> None:
        for _ in range(STEPS):
            model(tokens[:1, :1].expand(batch, 1), past_key_values=cache, use_cache=True)

    def read(batch: int) -> Any:
        return model(prompt.expand(batch, -1), use_cache=True, logits_to_keep=1).past_key_values

    flops, gathered = {}, 0
    for repeat in range(6):
        for enabled in (False, True):
            settings["enabled"] = enabled
            kind = "dynamic" if enabled else "plain"
            cache = timed(f"prefill {kind}", read, 1)
            if enabled:
                timed("settle", model.settle, cache)
                ours = {each.data_ptr() for each in model.parameters()}
                network = cache.dynamic_prompt.network.parameters()
                gathered = sum(each.nbytes for each in network if each.data_ptr() not in ours)
            with FlopCounterMode(display=False) as counter:
                model(tokens[:1, :1], past_key_values=cache, use_cache=True)
            head = 2 * runtime.shape.vocab_size * runtime.shape.hidden_size
            flops[kind] = counter.get_total_flops() - head
            for batch in BATCHES:
                cache = cache if batch == 1 else read(batch)
                if enabled and batch > 1:
                    model.settle(cache)
                timed(f"decode {batch} {kind}", write, cache, batch)
        if repeat == 0:
            seconds.clear()  # the first repeat warms up
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    spread = {name: [min(values), max(values)] for name, values in seconds.items()}
    return {"seconds": medians, "spread": spread, "flops": flops, "gathered_bytes": gathered}


def render(found: dict[str, Any]) -> str:
    settings, results = found["settings"], found["results"]
    texts = list(settings["texts"])
    base = next(each for each in results if each["name"] == "unpruned")
    tasks = list(base.get("tasks", {}))
    rows, costs = [], []
    for each in results:
        excess = [each["loss"][name] - base["loss"][name] for name in texts]
        score = f"{100 * statistics.mean(each['tasks'].values()):.1f}" if each.get("tasks") else NONE
        losses = [f"{each['loss'][name]:.3f}" for name in texts]
        rows.append([f"{each['ratio']:.0%}", each["name"], *losses, *(f"{value:.3f}" for value in excess), score])
        if "cost" in each:
            seconds, flops = each["cost"]["seconds"], each["cost"]["flops"]
            saved = [
                f"{1 - seconds[f'decode {batch} dynamic'] / seconds[f'decode {batch} plain']:.0%}" for batch in BATCHES
            ]
            measuring = seconds["prefill dynamic"] / seconds["prefill plain"] - 1
            costs.append(
                [
                    f"{each['ratio']:.0%}",
                    f"{1 - flops['dynamic'] / flops['plain']:.1%}",
                    *saved,
                    f"{measuring:+.1%}",
                    f"{seconds['settle'] / seconds['prefill plain']:.0%}",
                    f"{each['cost']['gathered_bytes'] / 2**20:.0f} MiB",
                    f"{each['prior_weight']:g}",
                ]
            )
    heads = ["work saved", "method", *(f"loss, {name}" for name in texts), *(f"excess, {name}" for name in texts)]
    return f"""# Dynamic pruning

`make bench-dynamic`: {settings["model"]}, {settings["dtype"]} on {settings["device"]}, number of threads: {
        settings["threads"]
    }, calibrated on {settings["samples"]} windows of {settings["calibration"]}.

| column | meaning |
| --- | --- |
| work saved | share of the multiplications that a generated token saves in the projections of the blocks |
| loss | loss in nats per token: the model reads {READ} tokens of a window, and the loss is of the next {
        LENGTH - READ
    }; {settings["windows"]} windows of each text |
| excess | loss minus the loss of the unpruned model |
| tasks | mean accuracy in percent over {", ".join(tasks) or "no tasks"}; the first {
        settings["limit"]
    } examples of each |

`secateur, static` is pruned by the same share of parameters; the pruned model reads the prompt too.

{markdown([*heads, "tasks"], rows)}

## What it costs

Times are medians of five repeats that alternate between the plain and the dynamic model.

| column | meaning |
| --- | --- |
| FLOPs | share that a generated token after {
        READ
    } tokens saves, by torch's counter; attention counts, the head does not |
| decode | share of the time that a generated token saves, against the same model with all its units |
| measuring | additional time of a prefill that measures the prompt |
| gathering | time for choosing, gathering and compensating, as a share of the time of a prefill of {READ} tokens |
| extra memory | memory of the gathered weights |
| prior weight | weight of the calibration text in the choice of units |

{
        markdown(
            [
                "work saved",
                "FLOPs",
                *(f"decode, batch {batch}" for batch in BATCHES),
                "measuring",
                "gathering",
                "extra memory",
                "prior weight",
            ],
            costs,
        )
    }

{common.versions_line(settings)}
"""


def _quiet(share: float) -> None:
    """Report nothing: the benchmark reports progress after each case."""


if __name__ == "__main__":
    main()
