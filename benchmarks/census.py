"""``make bench-census``: a tiny checkpoint of every causal model type of transformers is pruned. Writes ``census.md``.

Each result is one line of a log. A census that was stopped continues where it was: types in the log are not run again.
``--table`` writes the page from the log without running a type.
"""

import argparse
import json
import shutil
import signal
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import transformers
from pydantic import TypeAdapter
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from benchmarks.table import markdown
from benchmarks.tiny import LISTS, save_tiny
from secateur.catalog.sources import locate
from secateur.catalog.spec import PruningSpec
from secateur.contract.errors import ErrorCode, PruningError
from secateur.engine.model.generic import sizes_of
from secateur.engine.model.plan import Plan, PlanData
from secateur.engine.run import static
from secateur.engine.run.run import NamedModel, prune_to_folder
from secateur.engine.run.workspace import Workspace

RATIO = 0.25
TEXTS = {
    "texts": ["The river runs past the old mill, and nobody knows how long it has been there. " * 60],
    "samples": 6,
    "sequence_length": 40,
}
RUNS: dict[str, dict[str, Any]] = {
    "secateur, per-layer": {"method": "secateur", "layout": "per-layer"},
    "secateur, uniform": {"method": "secateur", "layout": "uniform"},
    "magnitude, per-layer": {"method": "magnitude", "layout": "per-layer"},
    "magnitude, uniform": {"method": "magnitude", "layout": "uniform"},
    "piem-lsps, padded": {"method": "piem-lsps", "rounds": 2, "layout": "padded"},
}
"""The prunings of a type, by label. The first decides whether the type is refused, and its checkpoint is also loaded
in a fresh process."""
FIRST = next(iter(RUNS))
FINAL = {
    ErrorCode.UNSUPPORTED_ARCHITECTURE,
    ErrorCode.WEIGHTS_QUANTIZED,
    ErrorCode.WEIGHTS_MISSING,
    ErrorCode.TOKENIZER_MISSING,
    ErrorCode.CONFIG_INVALID,
}
"""Errors of the first pruning after which the other prunings are skipped: they would fail in the same way."""
TOLERANCE = 1e-3
"""Largest allowed difference of logits, relative to the largest logit."""
BUILD_SECONDS, RUN_SECONDS, COMPARE_SECONDS = 120, 240, 60
VERDICTS = {
    "works": "all prunings succeed, and the comparisons that were made find no difference",
    "partly": "the first pruning succeeds, and another one fails",
    "refused": "the engine refuses the model with an error code and a reason",
    "wrong": "the comparison finds a difference, or fails",
    "crash": "the first pruning raises an exception without an error code",
    "timeout": "the first pruning takes too long",
    "not built": "transformers cannot build a tiny model of the type from the census's config",
}
LENGTH = 300
"""Largest number of characters of a message in the log."""


class TimedOut(BaseException):
    """Raised when an attempt takes too long. No library catches it, as it is no ``Exception``."""


def main() -> None:
    arguments = parse()
    if not arguments.table:
        run(_types(arguments.types), arguments.log, arguments.threads)
    text = page(read_log(arguments.log))
    (arguments.output / "census.md").write_text(text)
    print(text)


def parse() -> argparse.Namespace:
    made = argparse.ArgumentParser(prog="python -m benchmarks.census", description=__doc__)
    made.add_argument(
        "--types",
        nargs="+",
        default=["causal"],
        metavar="TYPE",
        help=f"model types, or names of lists: {', '.join(LISTS)}",
    )
    made.add_argument("--log", type=Path, default=Path("build/census.jsonl"), help="the results, one type on a line")
    made.add_argument("--table", action="store_true", help="write the page from the log only")
    made.add_argument("--threads", type=int, default=1)
    made.add_argument("--output", type=Path, default=Path("docs/benchmarks"))
    return made.parse_args()


def run(types: Sequence[str], log: Path, threads: int) -> None:
    """Run all types that are not in the log, and append the result of each to the log."""
    torch.set_num_threads(threads)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    log.parent.mkdir(parents=True, exist_ok=True)
    done = {result["type"] for result in read_log(log)}
    for model_type in types:
        if model_type not in done:
            with tempfile.TemporaryDirectory(prefix="secateur-census-") as folder:
                result = examine(model_type, Path(folder))
            with log.open("a") as file:
                file.write(json.dumps(result) + "\n")
            print(model_type, *verdict(result), sep=" | ", flush=True)


def read_log(log: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []


def examine(model_type: str, folder: Path) -> dict[str, Any]:
    """Return the result of a model type: the class of its tiny model, and the outcome of every attempt."""
    source = folder / "source"
    built = attempt(lambda: save_tiny(model_type, source), BUILD_SECONDS)
    result: dict[str, Any] = {"type": model_type, "built": built, "runs": {}}
    if not built["ok"]:
        return result
    for label, settings in RUNS.items():
        outcome = result["runs"][label] = prune_once(source, folder / "pruned", settings, fresh_process=label == FIRST)
        if outcome.get("code") in FINAL:
            break
    return result


def prune_once(source: Path, output: Path, settings: dict[str, Any], *, fresh_process: bool) -> dict[str, Any]:
    """Prune the checkpoint and return the outcome. The result of method ``magnitude``, which has no recovery, is compared
    with the source."""
    spec = PruningSpec.model_validate(
        {
            "target_ratio": RATIO,
            "calibration": TEXTS,
            "evaluation": {**TEXTS, "latency": False, "prompts": []},
            "allocation": {"width_multiple": 8},
            **settings,
        }
    )
    shutil.rmtree(output, ignore_errors=True)

    def family() -> str:
        (report,) = prune_to_folder(NamedModel(str(source)), spec, output, Workspace(device="cpu"))
        return report.source.family

    with _checks(fresh_process):
        outcome = attempt(family, RUN_SECONDS)
    if outcome["ok"] and spec.method == "magnitude":
        outcome["comparison"] = attempt(lambda: difference(source, output), COMPARE_SECONDS)
        if not outcome["comparison"]["ok"] and not fresh_process:  # the check may refuse what cannot be loaded here
            return prune_once(source, output, settings, fresh_process=True)
    return outcome


@contextmanager
def _checks(fresh_process: bool) -> Iterator[None]:
    """Skip the check of the checkpoint in a fresh process, which takes seconds, unless ``fresh_process`` is true."""
    if fresh_process:
        yield
    else:
        with patch.object(static, "check_checkpoint", lambda decoder, folder, own_code: None):
            yield


def attempt(function: Callable[[], Any], seconds: int) -> dict[str, Any]:
    """Call the function and return its value, or how it failed: refused, by an exception, or by the time limit."""

    def stop(*_: Any) -> None:
        raise TimedOut

    began = time.monotonic()
    signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        outcome = {"ok": True, "value": function()}
    except PruningError as error:
        outcome = {"ok": False, "kind": "refused", "code": error.code, "message": error.message}
    except TimedOut:
        outcome = {"ok": False, "kind": "timeout", "code": "timeout", "message": f"longer than {seconds} s"}
    except Exception as error:  # other libraries may raise any exception
        outcome = {"ok": False, "kind": "crash", "code": type(error).__name__, "message": str(error)[:LENGTH]}
    finally:
        signal.alarm(0)
    return {**outcome, "seconds": round(time.monotonic() - began, 1)}


@torch.no_grad()
def difference(source: Path, output: Path) -> float | None:
    """Return the largest difference of logits between the pruned model and the source with the same units set to zero,
    relative to the largest logit.

    Both models are of transformers' classes; no code of the engine is in the forward pass. Models with experts are not
    compared: the result is None.
    """
    tokens = torch.randint(3, 250, (2, 96), generator=torch.Generator().manual_seed(5))
    shape = sizes_of(locate(str(source), allow_paths=True))
    if shape.family.experts:
        return None
    manifest = json.loads((output / "secateur.json").read_text())
    plan = Plan.from_data(TypeAdapter(PlanData).validate_python(manifest["plan"]))
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(source, dtype="auto").eval()
    pruned = AutoModelForCausalLM.from_pretrained(output, dtype="auto", trust_remote_code=True).eval()
    group = shape.stock_layer.heads_per_group * shape.stock_layer.head_dim
    layers: Any = model.get_submodule(shape.family.layers)
    for layer, kept in zip(layers, plan.layers, strict=True):
        heads = [index * group + offset for index in kept["kv_groups"] for offset in range(group)]
        _zero_all_but(layer, shape.family.attention_output, heads)
        _zero_all_but(layer, shape.family.channel_output, list(kept["channels"]))
    expected = model(tokens, use_cache=False).logits.float()
    found = pruned(tokens, use_cache=False).logits.float()
    return float((expected - found).abs().max() / expected.abs().max())


def _zero_all_but(layer: torch.nn.Module, name: str, kept: list[int]) -> None:
    """Set the inputs of a projection of the layer to zero, except those in ``kept``."""
    projection: Any = layer.get_submodule(name.rpartition(".")[0])
    if isinstance(projection, Conv1D):  # of GPT-2: the engine puts a linear layer inside it
        width = projection.nx
    else:
        projection = layer.get_submodule(name)
        width = projection.in_features
    mask = torch.zeros(width)
    mask[kept] = 1
    projection.register_forward_pre_hook(lambda module, inputs: (inputs[0] * mask.to(inputs[0].dtype), *inputs[1:]))


def verdict(result: dict[str, Any]) -> tuple[str, str]:
    """Return the verdict on a type, a key of :data:`VERDICTS`, and the reason for it."""
    if not result["built"]["ok"]:
        return "not built", _failure(result["built"])
    runs = result["runs"]
    if not runs[FIRST]["ok"]:
        return runs[FIRST]["kind"], _failure(runs[FIRST])
    compared = {label: outcome["comparison"] for label, outcome in runs.items() if "comparison" in outcome}
    for label, comparison in compared.items():
        if not comparison["ok"]:
            return "wrong", f"{label}: {_failure(comparison)}"
        if (comparison["value"] or 0) > TOLERANCE:
            return "wrong", f"{label}: the logits differ by {comparison['value']:.1e} of the largest logit"
    failed = [f"{label}: {_failure(outcome)}" for label, outcome in runs.items() if not outcome["ok"]]
    if failed:
        return "partly", "; ".join(failed)
    values = [comparison["value"] for comparison in compared.values() if comparison["value"] is not None]
    if not values:
        logits = "logits are not compared"
    else:
        logits = f"logits differ by {max(values):.0e}" if max(values) else "logits are equal"
    return "works", f"family `{runs[FIRST]['value']}`; {logits}"


def _failure(outcome: dict[str, Any]) -> str:
    """Return the error code and the part of the message that is about this type."""
    message = outcome["message"]
    for start in ("cannot be pruned: ", "not built like Llama: "):
        message = message.rpartition(start)[2]
    for end in (" Supported: ", " With an adapter: "):
        message = message.partition(end)[0]
    message = " ".join(message.split()).replace("|", "\\|").replace("`", "'").replace("<", "&lt;")
    return f"`{outcome['code']}`: {message[:200]}"


def page(results: Sequence[dict[str, Any]]) -> str:
    """Return the page: the counts of the verdicts, and a row for each type."""
    verdicts = {result["type"]: verdict(result) for result in sorted(results, key=lambda result: result["type"])}
    counts = Counter(name for name, _ in verdicts.values())
    tables = "\n\n".join(_section(name, types, verdicts) for name, types in LISTS.items())
    return f"""# Census of model types

`make bench-census`: a tiny model with random weights of each of {len(verdicts)} model types of transformers \
{transformers.__version__} is pruned on the CPU. Model types that were not run are not in the tables. The tiny model has the default \
features of its type's config; a published model of the type may have other features and another verdict.

Each model is pruned {len(RUNS)} times by {RATIO:.0%}: {"; ".join(RUNS)}. The checkpoint of the first pruning is also loaded in a fresh \
process. The results of `magnitude` are compared with the unpruned model in which the removed units are set to zero: the logits may \
differ by at most {TOLERANCE:g} of the largest logit. Models with experts are not compared.

{markdown(["verdict", "meaning", "types"], [[name, meaning, str(counts[name])] for name, meaning in VERDICTS.items()])}

{tables}
"""


def _section(name: str, types: Sequence[str], verdicts: dict[str, tuple[str, str]]) -> str:
    rows = [[f"`{model_type}`", *verdicts[model_type]] for model_type in types if model_type in verdicts]
    mapping = {"causal": "causal language models", "image-text": "image-text models that are no causal language models"}
    text = f"## List `{name}`\n\n{len(rows)} of {len(types)} model types were run: transformers' {mapping[name]}."
    return f"{text}\n\n{markdown(['type', 'verdict', 'reason'], rows)}" if rows else text


def _types(names: Sequence[str]) -> list[str]:
    return [model_type for name in names for model_type in LISTS.get(name, [name])]


if __name__ == "__main__":
    main()
