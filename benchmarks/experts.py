"""Experts removed from a small mixture that is trained for minutes: by REAP's criterion, by frequency, and at random."""

import math
import statistics
from typing import Any

from benchmarks.removal import remove
from secateur.catalog.spec import Calibration, Evaluation, PruningSpec
from secateur.engine.evaluation import perplexity
from secateur.engine.measure.cache import Statistics
from secateur.engine.measure.texts import batch_windows, read_windows
from tests.engine.models import decoder_of, english, make_model, make_tokenizer, train

STEPS = 600
EXPERTS = 8
REMOVED = (2, 4)
SEEDS = (0, 1, 2)
"""The seeds of the random choice."""
WINDOWS, LENGTH = 32, 64


def measure_experts() -> dict[str, Any]:
    """Train the mixture, remove experts from copies of it, and return the losses in nats per token."""
    tokenizer = make_tokenizer()
    model = make_model(
        "qwen3-moe", num_experts=EXPERTS, num_experts_per_tok=2, moe_intermediate_size=64, initializer_range=0.02
    )
    model.apply(model._init_weights)  # the test models' own weights are too large to learn from
    decoder = decoder_of(train(model, tokenizer, STEPS), tokenizer)
    asked = {"samples": WINDOWS, "sequence_length": LENGTH}
    calibration, evaluation = read_windows(
        decoder,
        Calibration(texts=english("calibration"), **asked),
        Evaluation(texts=english("evaluation"), **asked),
        0,
        None,
        None,
        _quiet,
    )

    def loss(scores: str, count: int, seed: int) -> float:
        parameters = sum(decoder.shape.price("experts", index) for index in range(len(decoder.layers)))
        spec = PruningSpec(
            method="reap",
            target_ratio=count * parameters / decoder.shape.prunable_parameters,
            scoring={"kind": scores},
            seed=seed,
        )
        pruned = remove(decoder, spec, calibration.tokens, None, lambda *_: None, Statistics(None, {}))
        return math.log(perplexity(pruned, evaluation.tokens, batch_windows(evaluation.tokens), _quiet))

    unpruned = math.log(perplexity(decoder, evaluation.tokens, batch_windows(evaluation.tokens), _quiet))
    rows = []
    for count in REMOVED:
        for scores in ("reap", "frequency", "random"):
            over = [loss(scores, count, seed) - unpruned for seed in (SEEDS if scores == "random" else SEEDS[:1])]
            spread = f"{min(over):.3f} to {max(over):.3f}" if len(over) > 1 else "–"
            rows.append(
                {
                    "scores": scores,
                    "removed": f"{count} of {EXPERTS}",
                    "loss": statistics.fmean(over),
                    "spread": spread,
                }
            )
    return {
        "model": f"A Qwen3-MoE of {decoder.parameters / 1e3:.0f} k parameters, {len(decoder.layers)} layers of {EXPERTS} experts "
        f"with 2 for each token, trained for {STEPS} steps on the demo's text.",
        "unpruned": unpruned,
        "rows": rows,
    }


def _quiet(share: float) -> None:
    """Report nothing."""
