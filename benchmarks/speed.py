"""``make bench-speed``: time and memory of one round of each method, against one forward pass over the calibration tokens.

Every method runs in its own process, without statistics of earlier runs. The benchmark writes ``speed.json`` after each
method, and ``speed.md`` at the end.
"""

import sys
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import Any

import torch
from torch import Tensor

from benchmarks import common
from benchmarks.case import Case, prune, read_texts
from benchmarks.model import load_smollm2
from benchmarks.results import Results
from benchmarks.table import markdown
from secateur.catalog.methods import METHODS
from secateur.engine.evaluation import weight_bytes
from secateur.engine.evaluation.latency import now, peak_memory, reset_peak_memory
from secateur.engine.measure.cache import Statistics
from secateur.engine.measure.texts import batch_windows
from secateur.engine.model.decoder import Decoder

RATIO = 0.5
MOST_PASSES = 6.0
"""The most forward passes that a method without gradients may take."""
MOST_MEMORY = 1.5
"""The most memory that a method may take, as a multiple of the model, without one batch of hidden states."""


def main() -> None:
    arguments = common.parser("speed", __doc__, "float32").parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    settings = {**common.settings(arguments, device), "ratio": RATIO, "threads": torch.get_num_threads()}
    results = Results(arguments.output / "speed.json", settings)
    cases = [
        Case(method, RATIO, 1, 0, "repeated", arguments.samples, arguments.sequence_length)
        for method in arguments.methods
    ]
    for case in cases:
        if results.get(case) is None:
            with ProcessPoolExecutor(1, get_context("spawn")) as fresh:
                result = fresh.submit(measure, case, arguments.calibration, arguments.dtype).result()
            results.add(case, result)
            print(f"{case.method}: {result}", file=sys.stderr, flush=True)
    text = render(settings, cases, results)
    (arguments.output / "speed.md").write_text(text)
    print(text)


def measure(case: Case, text: str, dtype: str) -> dict[str, float]:
    """Measure the seconds of a forward pass and of the pruning, and the bytes of the model, of one batch of hidden states and the peak.

    The peak is the bytes of the model plus the bytes that the pruning added.
    """
    decoder = load_smollm2(dtype, case.kv_heads)
    tokens = read_texts(decoder, case, text, text)[0].tokens
    model_bytes = weight_bytes(decoder)
    forward(decoder, tokens[: batch_windows(tokens)])  # warms up
    forward_seconds = min(forward(decoder, tokens) for _ in range(2))
    reset_peak_memory(decoder.device)
    before, started = peak_memory(decoder.device), now(decoder.device)
    prune(decoder, decoder, case, tokens, Statistics(None, {}))
    seconds = now(decoder.device) - started
    states = batch_windows(tokens) * tokens.shape[1] * decoder.shape.hidden_size
    return {
        "forward_seconds": forward_seconds,
        "seconds": seconds,
        "model_bytes": model_bytes,
        "states_bytes": states * decoder.model.dtype.itemsize,
        "peak_bytes": model_bytes + peak_memory(decoder.device) - before,
    }


@torch.no_grad()
def forward(decoder: Decoder, tokens: Tensor) -> float:
    """Return the seconds of one forward pass over ``tokens`` ``[windows, length]``, logits included, in the batches of the engine."""
    started = now(decoder.device)
    for batch in tokens.split(batch_windows(tokens)):
        decoder.model(batch, use_cache=False)
    return now(decoder.device) - started


def render(settings: dict[str, Any], cases: list[Case], results: Results) -> str:
    rows, beyond = [], []
    for case in cases:
        result = results.get(case)
        assert result is not None
        passes = result["seconds"] / result["forward_seconds"]
        memory = (result["peak_bytes"] - result["states_bytes"]) / result["model_bytes"]
        gradients = METHODS[case.method].needs_gradients
        if passes > MOST_PASSES and not gradients:
            beyond.append(f"{case.method} takes {passes:.1f} forward passes")
        if memory > MOST_MEMORY:
            beyond.append(f"{case.method} takes {memory:.2f} times the model's memory")
        rows.append(
            [
                case.method,
                "yes" if gradients else "no",
                f"{result['seconds']:.1f}",
                f"{passes:.1f}",
                f"{result['peak_bytes'] / 2**20:.0f}",
                f"{memory:.2f}",
            ]
        )
    table = markdown(["method", "gradients", "s", "forward passes", "peak MiB", "peak, times the model"], rows)
    windows, length = cases[0].samples, cases[0].sequence_length
    return f"""# Speed and memory by method

{settings["model"]}, KV heads repeated to the query heads, {settings["dtype"]}, number of threads: {settings["threads"]}, on \
{settings["device"]}. Each method prunes in one round to {RATIO:.0%}, on {windows} × {length} tokens of {settings["calibration"]}. It runs \
in its own process, without statistics of earlier runs. Loading and the measurement of perplexity do not count.

| column | meaning |
| --- | --- |
| s | seconds of the pruning |
| forward passes | seconds of the pruning, divided by the seconds of one forward pass over the same tokens, logits included |
| peak MiB | memory of the model plus the memory that the pruning adds |
| peak, times the model | the peak without one batch of hidden states, divided by the memory of the model |

The limits are {MOST_PASSES:g} forward passes for a method without gradients, and {MOST_MEMORY:g} times the memory of the model. Beyond \
the limits: {"; ".join(beyond) or "none"}.

{table}

{common.versions_line(settings)}
"""


if __name__ == "__main__":
    main()
