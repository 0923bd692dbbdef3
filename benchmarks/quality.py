"""``make bench-quality``: perplexity by method, ratio and rounds, with equal parameters, on equal tokens, in one process.

After every case, the benchmark writes ``quality.json``, and the requested tables with the results so far to ``quality.md``.
"""

import argparse
import copy
import json
import sys
import time
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from statistics import mean
from typing import Any

from benchmarks import common
from benchmarks.ablations import ablations
from benchmarks.case import EVALUATION_WINDOWS, Case, prune, read_texts
from benchmarks.model import KvHeads, load_smollm2, repeat_kv_heads
from benchmarks.results import Results
from benchmarks.sections import Section, grid, trained, variants
from secateur.contract.errors import PruningError
from secateur.engine.evaluation import perplexity
from secateur.engine.measure.cache import Statistics
from secateur.engine.measure.texts import Windows, batch_windows
from secateur.engine.model.decoder import Decoder


def main() -> None:
    arguments = parse()
    sections = plan(arguments)
    as_it_is = load_smollm2(arguments.dtype, "as-is")
    decoders: dict[KvHeads, Decoder] = {"as-is": as_it_is, "repeated": repeat_kv_heads(as_it_is)}
    settings = {
        **common.settings(arguments, as_it_is.device.type),
        "evaluation": Path(arguments.evaluation).name,
        "evaluation_windows": list(EVALUATION_WINDOWS),
    }
    results = Results(arguments.output / "quality.json", settings)
    estimate = Estimate(sections, results)
    for cases in estimate.groups():
        decoder = decoders[cases[0].kv_heads]
        calibration, evaluation = read_texts(decoder, cases[0], arguments.calibration, arguments.evaluation)
        started = time.monotonic()
        unpruned = measure(decoder, evaluation)
        estimate.evaluation_seconds = time.monotonic() - started
        statistics = Statistics(None, {})
        for case in cases:
            try:
                result = run(decoder, case, calibration, evaluation, statistics)
            except PruningError as error:
                say(f"{title(case)}: {error}")
                continue
            results.add(case, {**result, "unpruned": unpruned})
            estimate.count(case, result["seconds"])
            say(
                f"{title(case)}: {result['perplexity']:.2f} (unpruned {unpruned:.2f}), "
                f"{result['parameters']:,} parameters in projections, {result['seconds']:.0f} s; {estimate}"
            )
            (arguments.output / "quality.md").write_text(render(settings, sections, results))
    text = render(settings, sections, results)
    (arguments.output / "quality.md").write_text(text)
    print(text)


def parse() -> argparse.Namespace:
    parser = common.parser("quality", __doc__, "bfloat16")
    parser.add_argument("--evaluation", default="wikitext2", help="a text file or data set that is not calibrated on")
    parser.add_argument("--ratios", type=float, nargs="+", default=[0.2, 0.4, 0.5])
    parser.add_argument("--rounds", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="seeds of the calibration windows")
    parser.add_argument("--kv-heads", choices=["repeated", "as-is"], default="repeated")
    parser.add_argument(
        "--variants", action="store_true", help="also KV heads as-is, 32 x 128 tokens, and 128 x 256 tokens"
    )
    parser.add_argument("--ablations", action="store_true", help="also the ablations of the papers")
    parser.add_argument("--trained", action="store_true", help="also two methods with training at 40 %%")
    return parser.parse_args()


def plan(arguments: argparse.Namespace) -> list[Section]:
    """Return the tables that the command line requests."""
    base = Case("random", 0.5, 1, 0, arguments.kv_heads, arguments.samples, arguments.sequence_length)
    seeds = arguments.seeds
    sections = [grid(base, arguments.methods, arguments.ratios, arguments.rounds, seeds)]
    if arguments.variants:
        sections += variants(base, arguments.methods, arguments.ratios, seeds)
    if arguments.ablations:
        sections += ablations(base, seeds)
    if arguments.trained:
        sections.append(trained(base, seeds))
    return sections


def run(
    decoder: Decoder, case: Case, calibration: Windows, evaluation: Windows, statistics: Statistics
) -> dict[str, Any]:
    """Prune a copy of ``decoder`` and measure it."""
    pruned = Decoder(copy.deepcopy(decoder.model), decoder.tokenizer, decoder.shape)
    started = time.monotonic()
    prune(pruned, decoder, case, calibration.tokens, statistics)
    seconds = time.monotonic() - started
    return {
        "perplexity": measure(pruned, evaluation),
        "seconds": seconds,
        "parameters": pruned.projection_parameters,
    }


def measure(decoder: Decoder, evaluation: Windows) -> float:
    return perplexity(decoder, evaluation.tokens, batch_windows(evaluation.tokens), lambda share: None)


class Estimate:
    """The cases that remain, and an estimate of their duration from earlier cases of the same methods."""

    def __init__(self, sections: Sequence[Section], results: Results) -> None:
        cases = {case.key: case for section in sections for case in section.cases()}
        self._left = {key: case for key, case in cases.items() if results.get(case) is None}
        self._rates: dict[str, float] = {}
        self.evaluation_seconds = 0.0
        for case in cases.values():
            if (known := results.get(case)) is not None:
                self._rates[case.method] = known["seconds"] / _work(case)

    def groups(self) -> list[list[Case]]:
        """Return the remaining cases, grouped by their calibration windows."""
        groups: dict[tuple[Any, ...], list[Case]] = defaultdict(list)
        for case in self._left.values():
            groups[case.calibration].append(case)
        return list(groups.values())

    def count(self, case: Case, seconds: float) -> None:
        del self._left[case.key]
        self._rates[case.method] = seconds / _work(case)

    def __str__(self) -> str:
        usual = mean(self._rates.values())
        seconds = sum(self._rates.get(case.method, usual) * _work(case) for case in self._left.values())
        seconds += self.evaluation_seconds * len(self._left)
        return f"{len(self._left)} cases left, about {seconds / 60:.0f} min"


def _work(case: Case) -> int:
    return case.rounds * case.samples * case.sequence_length


def render(settings: dict[str, Any], sections: Sequence[Section], results: Results) -> str:
    windows, length = settings["evaluation_windows"]
    unpruned = sorted({f"{result['unpruned']:.2f}" for result in results.all()})
    head = f"""# Quality by method

{settings["model"]}, {settings["dtype"]} on {settings["device"]}; unpruned perplexity {" or ".join(unpruned)}. Calibrated on \
{settings["calibration"]}, measured on the first {windows} × {length} tokens of {settings["evaluation"]}. Every pruned model has the \
requested number of parameters to within 0.5 %. No method trains, except in tables that say so.

| column | meaning |
| --- | --- |
| perplexity | geometric mean over the calibration seeds (smallest to largest) |
| excess | ln(ppl) − ln(ppl of the unpruned model), mean ± standard deviation over the calibration seeds |
| s | seconds to prune; cases share the statistics of the unpruned model. [speed](speed.md) has the time and memory of each method alone |

{common.versions_line(settings)}
"""
    return "\n".join([head, *(section.render(results.get) + "\n" for section in sections)])


def title(case: Case) -> str:
    changes = f" {json.dumps(case.changes)}" if case.changes else ""
    return (
        f"{case.method}{changes}, {case.ratio:.0%}, {case.rounds} rounds, seed {case.seed}, {case.kv_heads}, "
        f"{case.samples} x {case.sequence_length}"
    )


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
