"""The tables that the papers print, and for each line the case that reproduces it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

TASKS = ("boolq", "piqa", "hellaswag", "winogrande", "arc_easy", "arc_challenge", "openbookqa")
TEXTS = ("wikitext2", "ptb")

SLIMLLM = {"rounds": 1, "samples": 32, "sequence_length": 128}
"""Guo et al., section 5.1, use 32 samples of 128 tokens."""
PIEM = {"rounds": 4, "samples": 32, "sequence_length": 128}
"""Wang states neither the samples nor the rounds of the tables; figure 6 is about four rounds."""


@dataclass(frozen=True)
class Line:
    """A line of a table. ``method`` ``None`` means the unpruned model; ``printed`` has the order of the columns of the table."""

    label: str
    method: str | None
    ratio: float
    printed: Sequence[float | None]
    changes: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Table:
    """A table. ``columns`` names figures of a result: texts, tasks, ``mean``, ``retained``, ``redundancy`` or ``latency``."""

    title: str
    model: str
    settings: Mapping[str, int]
    columns: Sequence[str]
    lines: Sequence[Line]
    differs: str


def _quality(label: str, method: str | None, ratio: float, *printed: float) -> Line:
    return Line(label, method, ratio, printed)


QUALITY = (*TEXTS, *TASKS, "mean")
NO_REFIT = {"recovery": {"layerwise": {"kind": "none"}}}

TABLES = (
    Table(
        "SlimLLM, table 1 (without tuning)",
        "LLaMA-7B",
        SLIMLLM,
        QUALITY,
        [
            _quality("unpruned", None, 0.0, 12.62, 22.14, 73.18, 78.35, 72.99, 67.01, 67.45, 41.38, 42.4, 63.25),
            _quality(
                "LLM-Pruner", "llm-pruner", 0.2, 19.09, 34.21, 57.06, 75.68, 66.8, 59.83, 60.94, 36.52, 40.0, 56.69
            ),
            _quality(
                "LoRAPrune", "loraprune", 0.2, 20.67, 34.12, 57.98, 75.11, 65.81, 59.90, 62.14, 34.59, 39.98, 56.50
            ),
            _quality("LoRAP", "lorap", 0.2, 15.69, 25.86, 71.93, 76.44, 69.98, 65.9, 60.56, 38.48, 40.4, 60.53),
            _quality("SlimLLM", "slimllm", 0.2, 15.95, 26.09, 72.72, 75.95, 69.82, 66.06, 64.48, 39.33, 40.2, 61.22),
            _quality("Secateur", "secateur", 0.2),
            _quality(
                "LLM-Pruner", "llm-pruner", 0.5, 112.44, 255.38, 52.32, 59.63, 35.64, 53.20, 33.50, 27.22, 33.40, 42.13
            ),
            _quality(
                "LoRAPrune", "loraprune", 0.5, 121.96, 260.14, 51.78, 56.90, 36.76, 53.80, 33.82, 26.93, 33.10, 41.87
            ),
            _quality("LoRAP", "lorap", 0.5, 56.96, 87.71, 57.8, 63.82, 46.96, 57.3, 40.36, 27.73, 36.80, 47.25),
            _quality("SlimLLM", "slimllm", 0.5, 37.89, 67.68, 63.33, 65.40, 49.94, 58.80, 45.83, 30.38, 37.00, 50.10),
            _quality("Secateur", "secateur", 0.5),
        ],
        "The model here is fifty times smaller. On hard tasks its answers are hardly better than chance, so its accuracy has "
        "little room to fall. The calibration text is not BookCorpus. LoRAP here is its criterion alone, without its low-rank "
        "attention.",
    ),
    Table(
        "SlimLLM, table 4 (components left out, 50 %)",
        "LLaMA-7B",
        SLIMLLM,
        (*TEXTS, "mean"),
        [
            Line("SlimLLM", "slimllm", 0.5, (37.89, 67.68, 50.10)),
            Line("without greedy search", "slimllm", 0.5, (40.89, 82.60, 48.35), {"scoring": {"greedy_swaps": False}}),
            Line("without feature space", "slimllm", 0.5, (38.26, 71.21, 49.74), {"scoring": {"feature_space": False}}),
            Line("uniform ratios", "slimllm", 0.5, (66.37, 123.52, 42.16), {"allocation": {"kind": "uniform"}}),
        ],
        "This model has 30 layers of 9 heads; LLaMA-7B has 32 layers of 32 heads, so it has more heads to choose from.",
    ),
    Table(
        "SlimLLM, table 5 (α of the layer ratios, 50 %)",
        "LLaMA-7B",
        SLIMLLM,
        (*TEXTS, "mean"),
        [
            Line(f"α = {alpha}", "slimllm", 0.5, printed, {"allocation": {"alpha": alpha}})
            for alpha, printed in (
                (1, (54.17, 96.57, 44.42)),
                (4, (43.36, 83.91, 44.95)),
                (7, (37.89, 67.68, 50.10)),
                (10, (44.82, 75.80, 46.86)),
            )
        ],
        "α multiplies cosines between layers, and the spread of these cosines differs from model to model.",
    ),
    Table(
        "SlimLLM, table 6 (linear regression)",
        "LLaMA-7B",
        SLIMLLM,
        (*TEXTS, "mean"),
        [
            Line("with, 20 %", "slimllm", 0.2, (15.95, 26.09, 61.22)),
            Line("without, 20 %", "slimllm", 0.2, (16.78, 26.98, 60.89), NO_REFIT),
            Line("with, 50 %", "slimllm", 0.5, (37.89, 67.68, 50.10)),
            Line("without, 50 %", "slimllm", 0.5, (48.66, 81.64, 46.66), NO_REFIT),
        ],
        "The regression is fit on the calibration text. It helps most if the evaluation text is similar to it.",
    ),
    Table(
        "PIEM + LSPS, table 2",
        "ChatGLM-6B",
        PIEM,
        ("latency", "retained", "redundancy"),
        [
            Line("Movement", "movement", 0.5, (117.9, 87.8, 33.2)),
            Line("Wanda", "wanda", 0.5, (111.3, 90.5, 37.4)),
            Line("SparseGPT", "sparsegpt", 0.5, (104.7, 89.2, 35.6)),
            Line("PIEM + LSPS", "piem-lsps", 0.5, (88.6, 92.3, 48.1)),
            Line("Secateur", "secateur", 0.5, (None, None, None)),
        ],
        "The paper states neither the ratio, nor the task of the accuracy, nor the definition of redundancy. Here all methods "
        "remove half of the parameters of the blocks, so redundancies and latencies must be close together. At one ratio, the "
        "choice of the units cannot make one method 25 % faster than another.",
    ),
    Table(
        "PIEM + LSPS, table 3 (the two components)",
        "ChatGLM-6B",
        PIEM,
        ("latency", "retained", "redundancy"),
        [
            Line("unpruned", None, 0.0, (123.4, 85.7, 0.0)),
            Line("+ PIEM", "piem", 0.5, (102.1, 89.6, 37.9)),
            Line("+ LSPS", "lsps", 0.5, (108.3, 88.4, 34.2)),
            Line("both", "piem-lsps", 0.5, (88.6, 92.3, 48.1)),
        ],
        "In the paper, the unpruned model 'retains' 85.7 %, less than all pruned models. By our definition, it retains 100 %.",
    ),
)

LATENCY = ((0.0, 0.3008, 13.12), (0.2, 0.1429, 11.48), (0.5, 0.1034, 9.38))
"""SlimLLM, table 3, LLaMA-7B on a V100: ratio, seconds of a prefill of 256 tokens, seconds of decoding 256 tokens at batch 8."""
