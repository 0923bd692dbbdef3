"""``prune(model, spec)``: load, calibrate; per target rounds of scoring, allocating, cutting, mending and measuring, training,
export and check."""

import hashlib
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from secateur.catalog.sources import ModelSource, locate, read_shape
from secateur.catalog.spec import PruningSpec, target_folder
from secateur.contract.errors import PruningError
from secateur.engine.dynamic.check import check_dynamic
from secateur.engine.dynamic.runtime import Runtime
from secateur.engine.dynamic.targets import DynamicTargets
from secateur.engine.evaluation import Suite, forward_flops, paired, perplexity, unsteady, weight_bytes
from secateur.engine.export import check_checkpoint, check_room, gguf, staged, versions, write_manifest, write_model
from secateur.engine.measure.cache import Statistics
from secateur.engine.measure.texts import SAMPLED, Windows, batch_windows, read_texts, read_windows
from secateur.engine.model.cutting import pad
from secateur.engine.model.decoder import Decoder
from secateur.engine.model.generic import sizes_of
from secateur.engine.model.loading import download, load
from secateur.engine.model.plan import Plan
from secateur.engine.run import tensor_files
from secateur.engine.run.progress import Progress
from secateur.engine.run.targets import Targets

FLOPS_TOKENS = 256
READ_SHARE = 0.5
"""Of every window that a dynamic model is measured on, its prompt; the rest is what it would have written."""


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
    tasks_dir: Path | None = None,
    token: str | None = None,
    endpoint: str | None = None,
    allow_paths: bool = True,
    max_parameters: int | None = None,
    device: str | None = None,
    scratch: Path | None = None,
    statistics_dir: Path | None = None,
    on_event: Callable[[dict[str, Any]], None] = lambda event: None,
    resume: dict[str, Any] | None = None,
    stop: Callable[[], bool] = lambda: False,
    manifest_extra: Callable[[int], dict[str, Any]] = lambda index: {},
) -> PruningResult:
    """Prune a model as ``spec`` says and write it to ``output_dir``, checked to load without this project.

    ``model_id`` is a Hub id, ``local:NAME`` under ``models_dir``, or (``allow_paths``) a folder or GGUF file. A list of
    ratios makes a folder ``ratio-R`` of each, and a report ``{"targets": [...]}``.
    ``on_event`` gets JSON-able dicts: ``progress`` (see :class:`~secateur.engine.run.progress.Progress`), ``warning``
    {message}, and after the unpruned model is measured (0), after every round and every stretch of training ``round``
    {number, data, state}; ``resume`` takes such a ``state`` and goes on after it, given the ``scratch`` folder in which
    the weights that a recovery changed are kept (unset: one beside ``output_dir`` that goes in the end): those of the last
    two states, so ``on_event`` returns when a state is safe. ``stop`` is asked before every round and after every stretch
    of training. ``statistics_dir`` keeps what is known of the source for later jobs. ``manifest_extra`` gives, for a
    target's index, what its manifest also says.

    Raises:
        PruningError: what a person can act on; ``output_dir`` is not made then.
        Paused: ``stop()`` returned true.
    """
    started = time.monotonic()
    if output_dir.exists() and not (output_dir.is_dir() and not any(output_dir.iterdir())):
        raise PruningError("output_exists", f"{output_dir} is there already and no empty folder.")
    progress = Progress(on_event, spec)
    progress.stage("downloading")
    options = {"models_dir": models_dir, "token": token, "endpoint": endpoint, "allow_paths": allow_paths}
    source = locate(model_id, revision=_revision(resume, revision), gguf_file=gguf_file, **options)  # type: ignore[arg-type]
    if source.sizes_known:  # or they are once it is here
        shape = read_shape(source)
        spec.ratios(shape, source.dtype)
        spec.check_fits(shape, source.config or {})
    source = download(source, token, endpoint, progress.bytes)
    progress.stage("loading")
    ratios = spec.ratios(sizes_of(source), source.dtype)
    where = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    decoder = load(source, spec.dtype, where, max_parameters)
    progress.weights(weight_bytes(decoder))
    decoder.read_share = READ_SHARE if spec.is_dynamic else 0.0
    spec.check_fits(decoder.shape, decoder.model.config.to_dict())
    if "gguf" in spec.formats:
        gguf.check_ready(decoder, source)
    _check_resumable(resume, source, spec)

    asked = spec.calibration, spec.evaluation
    progress.stage("calibrating", tokens=sum(each.samples * each.sequence_length for each in asked))
    calibration, evaluation = read_windows(
        decoder, spec.calibration, spec.evaluation, spec.seed, texts_dir, token, progress.share, allow_paths
    )
    texts = read_texts(decoder, spec.evaluation, texts_dir, token, allow_paths)
    suite = Suite(spec.evaluation, texts, tasks_dir)
    for message in _shortfalls(spec, calibration, evaluation):
        on_event({"type": "warning", "message": message})

    def measure(decoder: Decoder, whole: bool = True) -> dict[str, Any]:
        alone = suite if whole else None
        progress.stage("evaluating", tokens=None if alone and alone.lengthy else evaluation.tokens.numel())
        measured = _measure(decoder, evaluation, alone, progress)
        if unsteady(measured["latency"]):
            message = "latency: repeats are far apart, so the machine was busy with something else; see their spread."
            on_event({"type": "warning", "message": message})
        return measured

    state = resume
    if state is None:
        baseline = measure(decoder)
        state = {**_identity(source, spec), "baseline": baseline, "targets": []}
        on_event({"type": "round", "number": 0, "data": baseline, "state": state})
    with tensor_files.folder(scratch, output_dir.parent) as kept:
        shared: dict[str, Any] = {
            "spec": spec,
            "ratios": ratios,
            "decoder": decoder,
            "tokens": calibration.tokens,
            "batch_windows": batch_windows(calibration.tokens),
            "measure": measure,
            "progress": progress,
            "on_event": on_event,
            "stop": stop,
            "state": state,
        }
        targets: Targets | DynamicTargets
        if spec.is_dynamic:
            targets = DynamicTargets(**shared, source=source)
        else:
            statistics = Statistics(statistics_dir, _statistics_key(source, spec, calibration, where))
            reload = lambda: load(source, spec.dtype, where)  # noqa: E731
            targets = Targets(**shared, load=reload, statistics=statistics, scratch=kept)
        del decoder, shared

        def finish(index: int, staging: Path) -> dict[str, Any]:
            """Prune to one target and write it. Its model goes with this frame, before the next one's is loaded."""
            folder = staging / target_folder(ratios[index]) if spec.several else staging
            folder.mkdir(exist_ok=True)
            decoder = targets.make(index, folder)
            done = targets.state["targets"][index]
            _check_reached(decoder, ratios[index], spec)
            progress.stage("exporting")
            report = _report(decoder, source, spec, targets.state["baseline"], done, calibration, evaluation)
            report["seconds"] = time.monotonic() - started
            plan = Plan.from_dict(done["plan"])
            if spec.layout == "padded":
                pad(decoder)
            report["published"] = {"parameters": decoder.parameters, "weights_bytes": weight_bytes(decoder)}
            file = folder / f"model-{spec.gguf_quantization}.gguf" if "gguf" in spec.formats else None
            if not isinstance(decoder, Runtime):  # which was written to be measured
                check_room(decoder, folder, spec.formats)
                if file is not None:
                    gguf.write_gguf(decoder, source, file, spec.gguf_quantization)
                write_model(decoder, source, plan, folder, spec.layout != "per-layer")
            write_manifest(decoder, plan, folder, report, manifest_extra(index))
            progress.stage("checking")
            if isinstance(decoder, Runtime):
                check_dynamic(decoder, folder)
            else:
                check_checkpoint(decoder, folder, own_code=any(folder.glob("*.py")))
            if file is not None:
                gguf.check_gguf(decoder, file, spec.gguf_quantization)
            return report

        with staged(output_dir) as staging:
            reports = [finish(index, staging) for index in range(len(ratios))]
    progress.done()
    return PruningResult(output_dir, {"targets": reports} if spec.several else reports[0])


def _statistics_key(
    source: ModelSource, spec: PruningSpec, calibration: Windows, where: torch.device
) -> dict[str, Any]:
    """All that statistics of the source depend on beside their name."""
    return {
        "fingerprint": source.fingerprint(),
        "source": [source.name, source.gguf_file],
        "dtype": spec.dtype,
        "tokens": hashlib.sha256(calibration.tokens.cpu().numpy().tobytes()).hexdigest(),
        "seed": spec.seed,
        "device": where.type,
        "versions": versions(),
    }


def _check_reached(decoder: Decoder, ratio: float, spec: PruningSpec) -> None:
    """The promise, held against what was cut: the target is met to within one block of channels."""
    shape, reached = decoder.shape, decoder.reached_ratio
    block = shape.block(spec.allocation.width_multiple, spec.uniform)
    if abs(reached - ratio) * shape.prunable_parameters > block:
        raise PruningError("ratio_missed", f"The target {ratio:g} was missed: {reached:.6f} was reached.")


def _measure(decoder: Decoder, evaluation: Windows, suite: Suite | None, progress: Progress) -> dict[str, Any]:
    """With the ``suite`` that takes longer: of the unpruned model, and of a target's last round."""
    parts = 2 if suite is not None and suite.lengthy else 1
    with decoder.routed():
        value = perplexity(
            decoder, evaluation.tokens, batch_windows(evaluation.tokens), lambda share: progress.share(share / parts)
        )
        found = (
            suite.measure(decoder, lambda share: progress.share((parts - 1 + share) / parts))
            if suite
            else {"latency": None}
        )
    return {
        "perplexity": value if math.isfinite(value) else None,  # JSON has no infinity
        "parameters": decoder.parameters,
        "prunable_parameters": decoder.prunable_parameters,
        "weights_bytes": weight_bytes(decoder),
        "flops": forward_flops(decoder, FLOPS_TOKENS),
        **found,
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
    before: dict[str, Any],
    done: dict[str, Any],
    calibration: Windows,
    evaluation: Windows,
) -> dict[str, Any]:
    """``before`` is what the unpruned model measured, ``done`` the target's part of the state."""
    after = done["rounds"][-1]
    widths = {"before": Plan.full(decoder.shape.layers).widths(decoder.shape), "after": after["widths"]}
    units = {
        when: sum(layer["kv_groups"] + layer["channels"] * decoder.shape.layers[0].experts for layer in layers)
        for when, layers in widths.items()
    }

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
        "parts": spec.parts,
        "round_count": spec.round_count,
        "ratio": {
            "target": done["ratio"],
            "reached": decoder.reached_ratio,
            "of_all_parameters": 1 - after["parameters"] / before["parameters"],
            "of_flops": 1 - after["flops"] / before["flops"],
        },
        "redundancy_removed": 1 - units["after"] / units["before"],
        **paired(before, after),
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
        "widths": widths,
        "rounds": done["rounds"],
        "calibration": calibration.as_dict(),
        "evaluation": evaluation.as_dict(),
        "dtype": str(decoder.model.dtype).removeprefix("torch."),
        "device": str(decoder.device),
        "seed": spec.seed,
        "versions": versions(),
    }
