"""``prune(model, spec)``: load, calibrate, and per round score, allocate, slice, measure; then export and check."""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from app.catalog.errors import PruningError
from app.catalog.methods import METHODS
from app.catalog.sources import ModelSource, locate, read_shape
from app.catalog.spec import PruningSpec
from workers.engine.calibration import SAMPLED, Windows, read_windows
from workers.engine.decoder import Decoder
from workers.engine.evaluation import forward_flops, measure_latency, perplexity, weight_bytes
from workers.engine.export import check_checkpoint, staged, versions, write_checkpoint
from workers.engine.loading import download, load
from workers.engine.plan import Plan
from workers.engine.progress import Progress
from workers.engine.rounds import prune_round
from workers.engine.schedule import round_targets
from workers.engine.scoring import Context
from workers.engine.slicing import apply_plan

FLOPS_TOKENS = 256
BATCH_TOKENS = 2048
"""Tokens of one forward or backward pass: bounds activations, and the logits that are the largest of them."""


class Paused(Exception):
    """``stop()`` said so after a completed round; its ``round`` event holds what resuming needs."""


@dataclass(frozen=True)
class PruningResult:
    """The pruned model's folder, and the report as plain JSON-able data."""

    folder: Path
    report: dict[str, Any]


def prune(
    model_id: str,
    spec: PruningSpec,
    output_dir: Path,
    *,
    revision: str | None = None,
    gguf_file: str | None = None,
    models_dir: Path | None = None,
    texts_dir: Path | None = None,
    token: str | None = None,
    endpoint: str | None = None,
    allow_paths: bool = True,
    device: str | None = None,
    on_event: Callable[[dict[str, Any]], None] = lambda event: None,
    resume: dict[str, Any] | None = None,
    stop: Callable[[], bool] = lambda: False,
    manifest_extra: dict[str, Any] | None = None,
) -> PruningResult:
    """Prune a model as ``spec`` says and write it to ``output_dir``, checked to load without this project.

    ``model_id`` is a Hub id, ``local:NAME`` under ``models_dir``, or (``allow_paths``) a folder or GGUF file.
    ``on_event`` gets JSON-able dicts: ``progress`` {stage, round, rounds, share, remaining_seconds}, ``warning``
    {message}, and after the unpruned model is measured (0) and after every round ``round`` {number, data, state};
    ``resume`` takes such a ``state`` and goes on after that round. ``stop`` is asked after every round.

    Raises:
        PruningError: what a person can act on; ``output_dir`` is not made then.
        Paused: ``stop()`` returned true.
    """
    started = time.monotonic()
    if output_dir.exists() and not (output_dir.is_dir() and not any(output_dir.iterdir())):
        raise PruningError("output_exists", f"{output_dir} is there already and no empty folder.")
    progress = Progress(on_event, spec.round_count)
    progress.stage("loading", 0)
    options = {"models_dir": models_dir, "token": token, "endpoint": endpoint, "allow_paths": allow_paths}
    source = locate(model_id, revision=_revision(resume, revision), gguf_file=gguf_file, **options)  # type: ignore[arg-type]
    if source.config is not None:  # else it is a GGUF file on the Hub: its sizes are known once it is here
        read_shape(source).check_ratio(spec.target_ratio, spec.allocation.width_multiple)
    source = download(source, token, endpoint)
    read_shape(source).check_ratio(spec.target_ratio, spec.allocation.width_multiple)
    decoder = load(source, spec.dtype, torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu")))
    _check_resumable(resume, source, spec)

    progress.stage("calibrating", 0)
    calibration, evaluation = read_windows(
        decoder, spec.calibration, spec.evaluation, spec.seed, texts_dir, token, progress.share, allow_paths
    )
    for message in _shortfalls(spec, calibration, evaluation):
        on_event({"type": "warning", "message": message})

    state = resume or {"plan": None, "rounds": [], "baseline": None}
    if state["baseline"] is None:
        progress.stage("evaluating", 0)
        state = {**_identity(source, spec), **state, "baseline": _measure(decoder, evaluation, spec, progress)}
        on_event({"type": "round", "number": 0, "data": state["baseline"], "state": state})
    plan = Plan.full(decoder.shape.layers) if state["plan"] is None else Plan.from_dict(state["plan"])
    apply_plan(decoder, plan)

    multiple = decoder.shape.width_multiple(spec.allocation.width_multiple)
    targets = round_targets(decoder.shape, spec.target_ratio, spec.round_count, spec.allocation.schedule, multiple)
    for number in range(len(state["rounds"]) + 1, spec.round_count + 1):
        if stop():
            raise Paused
        begun = time.monotonic()
        progress.stage("scoring", number)
        context = Context(
            decoder, calibration.tokens, _batch(calibration), spec.scoring, spec.seed + number, progress.share
        )
        plan = plan.then(prune_round(context, METHODS[spec.method], targets[number - 1], multiple))
        progress.stage("evaluating", number)
        data = {
            "number": number,
            "ratio": {"target": targets[number - 1].ratio, "reached": _ratio(decoder)},
            "widths": plan.widths(decoder.shape),
            **context.details,
            **_measure(decoder, evaluation, spec, progress, latency=number == spec.round_count),
            "seconds": time.monotonic() - begun,
        }
        state = {**state, "plan": plan.as_dict(), "rounds": [*state["rounds"], data]}
        on_event({"type": "round", "number": number, "data": data, "state": state})

    _check_reached(decoder, spec, multiple)
    progress.stage("exporting", spec.round_count)
    report = _report(decoder, source, spec, plan, state, calibration, evaluation)
    report["seconds"] = time.monotonic() - started
    with staged(output_dir) as folder:
        write_checkpoint(decoder, source, plan, folder, report, manifest_extra or {})
        progress.stage("checking", spec.round_count)
        check_checkpoint(decoder, folder)
    progress.done()
    return PruningResult(output_dir, report)


def _check_reached(decoder: Decoder, spec: PruningSpec, multiple: int) -> None:
    """The promise, held against what was cut: the target is met to within one block of channels."""
    missed = abs(_ratio(decoder) - spec.target_ratio) * decoder.shape.prunable_parameters
    if missed > multiple * decoder.shape.cost.channel:
        raise PruningError(
            "ratio_missed", f"The target {spec.target_ratio:g} was missed: {_ratio(decoder):.6f} was reached."
        )


def _batch(windows: Windows) -> int:
    return max(1, BATCH_TOKENS // windows.tokens.shape[1])


def _ratio(decoder: Decoder) -> float:
    return 1 - decoder.prunable_parameters / decoder.shape.prunable_parameters


def _measure(
    decoder: Decoder, evaluation: Windows, spec: PruningSpec, progress: Progress, latency: bool = True
) -> dict[str, Any]:
    value = perplexity(decoder, evaluation.tokens, _batch(evaluation), progress.share)
    return {
        "perplexity": value if math.isfinite(value) else None,  # JSON has no infinity
        "parameters": decoder.parameters,
        "prunable_parameters": decoder.prunable_parameters,
        "weights_bytes": weight_bytes(decoder),
        "flops": forward_flops(decoder, FLOPS_TOKENS),
        "latency": measure_latency(decoder) if latency and spec.evaluation.latency else None,
    }


def _identity(source: ModelSource, spec: PruningSpec) -> dict[str, Any]:
    return {"fingerprint": source.fingerprint(), "revision": source.revision, "spec": spec.published()}


def _revision(resume: dict[str, Any] | None, asked: str | None) -> str | None:
    """A resumed job goes on with the commit that it began with, wherever its branch points now."""
    return resume["revision"] or asked if resume else asked


def _check_resumable(resume: dict[str, Any] | None, source: ModelSource, spec: PruningSpec) -> None:
    if resume and {key: resume[key] for key in ("fingerprint", "revision", "spec")} != _identity(source, spec):
        raise PruningError(
            "source_changed",
            f"{source.model_id} or the request changed since this job's first rounds; start it anew.",
            field="model_id",
        )


def _shortfalls(spec: PruningSpec, calibration: Windows, evaluation: Windows) -> list[str]:
    """What of the text is not as it was asked for, in words."""
    messages = []
    for name, windows, asked in (
        ("calibration", calibration, spec.calibration),
        ("evaluation", evaluation, spec.evaluation),
    ):
        count, length = windows.tokens.shape
        if count < asked.samples or length < asked.sequence_length:
            wanted = f"{asked.samples} of {asked.sequence_length}"
            messages.append(f"{name}: {count} windows of {length} tokens, where {wanted} were asked for.")
    if evaluation.source == SAMPLED != calibration.source:
        messages.append("evaluation: the calibration text is too short to hold any of it out; sampled from the model.")
    return messages


def _report(
    decoder: Decoder,
    source: ModelSource,
    spec: PruningSpec,
    plan: Plan,
    state: dict[str, Any],
    calibration: Windows,
    evaluation: Windows,
) -> dict[str, Any]:
    before, after = state["baseline"], state["rounds"][-1]

    def pair(key: str) -> dict[str, Any]:
        return {"before": before[key], "after": after[key]}

    def peak(measured: dict[str, Any]) -> int | None:
        return measured["latency"] and measured["latency"]["peak_memory_bytes"]

    return {
        "source": {
            "model_id": source.name,
            "revision": source.revision,
            "gguf_file": source.gguf_file,
            "fingerprint": source.fingerprint(),
            "family": decoder.shape.family.name,
            "model_type": decoder.shape.model_type,
        },
        "spec": spec.published(),
        "ratio": {
            "target": spec.target_ratio,
            "reached": _ratio(decoder),
            "of_all_parameters": 1 - after["parameters"] / before["parameters"],
            "of_flops": 1 - after["flops"] / before["flops"],
        },
        "parameters": {
            **pair("parameters"),
            "prunable_before": before["prunable_parameters"],
            "prunable_after": after["prunable_parameters"],
        },
        "weights_bytes": pair("weights_bytes"),
        "flops": pair("flops"),
        "perplexity": pair("perplexity"),
        "latency": pair("latency"),
        "peak_memory_bytes": {"before": peak(before), "after": peak(after)},
        "widths": {
            "before": Plan.full(decoder.shape.layers).widths(decoder.shape),
            "after": plan.widths(decoder.shape),
        },
        "rounds": state["rounds"],
        "calibration": calibration.as_dict(),
        "evaluation": evaluation.as_dict(),
        "dtype": str(decoder.model.dtype).removeprefix("torch."),
        "device": str(decoder.device),
        "seed": spec.seed,
        "versions": versions(),
    }
