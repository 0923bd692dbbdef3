"""One pruning of a benchmark: the case describes it, and the rounds of the engine run it."""

import json
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from benchmarks.model import KvHeads
from secateur.catalog.methods import Need
from secateur.catalog.resolve import resolve
from secateur.catalog.spec import Calibration, Evaluation, PruningSpec
from secateur.engine.allocation.schedule import round_goals
from secateur.engine.measure.cache import Statistics
from secateur.engine.measure.texts import Windows, batch_windows, read_windows
from secateur.engine.model.decoder import Decoder
from secateur.engine.recovery import train
from secateur.engine.run.rounds import prune_round
from secateur.engine.scoring import Context

RATIO_TOLERANCE = 0.005
EVALUATION_WINDOWS = (24, 256)


@dataclass(frozen=True)
class Case:
    """Everything that distinguishes one result of a benchmark from another.

    ``changes`` replaces settings of the method, with the fields of a request.
    """

    method: str
    ratio: float
    rounds: int
    seed: int
    kv_heads: KvHeads
    samples: int
    sequence_length: int
    changes: dict[str, Any] = field(default_factory=dict)

    @property
    def spec(self) -> PruningSpec:
        asked = {"method": self.method, "target_ratio": self.ratio, "rounds": self.rounds, "seed": self.seed}
        return PruningSpec.model_validate({**asked, **self.changes})

    @property
    def calibration(self) -> tuple[KvHeads, int, int, int]:
        """The settings that the statistics of the unpruned model depend on."""
        return self.kv_heads, self.samples, self.sequence_length, self.seed

    @property
    def key(self) -> str:
        return json.dumps(vars(self), sort_keys=True)


def read_texts(decoder: Decoder, case: Case, calibration: str, evaluation: str) -> tuple[Windows, Windows]:
    """Return calibration windows drawn with the seed of the case, and the first 24 × 256 tokens of the evaluation text.

    Both texts are files or data sets.
    """
    windows, length = EVALUATION_WINDOWS
    return read_windows(
        decoder,
        Calibration(dataset=calibration, samples=case.samples, sequence_length=case.sequence_length),
        Evaluation(dataset=evaluation, samples=windows, sequence_length=length),
        case.seed,
        texts_dir=None,
        token=None,
        progress=_quiet,
        allow_paths=True,
    )


def prune(decoder: Decoder, reference: Decoder, case: Case, tokens: Tensor, statistics: Statistics) -> None:
    """Prune ``decoder`` in place as ``case`` says, calibrated on ``tokens`` ``[windows, length]``.

    ``reference`` is the unpruned model. With one round and no training, it may be ``decoder`` itself.

    Raises:
        RuntimeError: the number of remaining parameters differs from the requested one by more than 0.5 %.
    """
    spec, shape, batch = case.spec, decoder.shape, batch_windows(tokens)
    dtype = str(decoder.model.dtype).removeprefix("torch.")
    resolved = resolve(spec, shape, config=decoder.model.config.to_dict(), source_dtype=dtype)
    chosen, multiple = resolved.components, resolved.width_multiple
    goals = round_goals(shape, case.ratio, case.rounds, spec.allocation.schedule, multiple)
    for number, goal in enumerate(goals, start=1):
        context = Context(
            decoder,
            tokens,
            batch,
            resolved,
            case.ratio,
            spec.seed + number,
            _quiet,
            reference=reference if chosen.fits_to_reference else None,
            statistics=statistics if number == 1 else None,
        )
        prune_round(context, goal)
    settings = spec.recovery.training
    if settings is not None and chosen.training is not None:
        beside = Need.REFERENCE in chosen.training.needs
        teacher = (lambda windows: reference.model(windows, use_cache=False).logits) if beside else None
        for _ in train(decoder, teacher, tokens, batch, settings, spec.seed, _quiet, None):
            pass
    share = decoder.projection_parameters / shape.prunable_parameters / (1 - case.ratio)
    if abs(share - 1) > RATIO_TOLERANCE:
        raise RuntimeError(f"{case.method} left {share:.2%} of the parameters that {case.ratio:.0%} should leave.")


def _quiet(share: float) -> None:
    """Report nothing: the benchmark reports progress after each case."""
