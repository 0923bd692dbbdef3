"""One pruning run: open the run on a model, prune its targets one after the other, and write each result to a folder.

:func:`open_run` loads the model, reads the texts and measures the unpruned model. :meth:`Run.prune` prunes one target.
:func:`prune_to_folder` does all of this and writes checked files; the service and the command line call it.
"""

import hashlib
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from secateur.catalog.budget import block
from secateur.catalog.methods import Need
from secateur.catalog.resolve import Components, Resolved, components, resolve
from secateur.catalog.sources import ModelSource, check_size, locate, read_shape
from secateur.catalog.spec import Format, Layout, PruningSpec, target_folder
from secateur.contract.errors import ErrorCode, PruningError
from secateur.contract.events import StepEvent, WarningEvent
from secateur.contract.report import Published, Report, Step, StepKind
from secateur.contract.stages import Stage
from secateur.engine.dynamic.pruner import DynamicPruner
from secateur.engine.evaluation import Suite, weight_bytes
from secateur.engine.export import gguf, staged, versions, write_manifest
from secateur.engine.measure.cache import Statistics
from secateur.engine.measure.texts import SAMPLED, Windows, batch_windows, read_texts, read_windows, refuse_uploads
from secateur.engine.model.decoder import Decoder
from secateur.engine.model.generic import sizes_of
from secateur.engine.model.layer_files import LayerFiles
from secateur.engine.model.loading import adopt, describe_loaded, download, load
from secateur.engine.model.placement import Placement
from secateur.engine.model.plan import indices_of, ranges_of
from secateur.engine.run import tensor_files
from secateur.engine.run.devices import choose_placement
from secateur.engine.run.endpoint import hub_at
from secateur.engine.run.measuring import Measurer
from secateur.engine.run.progress import Progress
from secateur.engine.run.pruner import Inputs, Pruned, Pruner, UnprunedModel
from secateur.engine.run.report import build_report
from secateur.engine.run.state import RunState, VocabularyState
from secateur.engine.run.static import StaticPruner
from secateur.engine.run.vocabulary import choose_vocabulary, evaluation_texts, refuse_tokens
from secateur.engine.run.workspace import Listener, Workspace
from secateur.engine.structures.vocabulary import Vocabulary

READ_SHARE = 0.5
"""Share of every measured window that a dynamic model reads as a prompt; the rest stands for the text that it would
generate."""


@dataclass(frozen=True)
class NamedModel:
    """A model by its name: a Hub id, ``local:NAME``, or, if the workspace allows paths, a folder or a GGUF file."""

    model_id: str
    revision: str | None = None
    gguf_file: str | None = None


@dataclass(frozen=True)
class LoadedModel:
    """A model in memory and its tokenizer.

    If the run needs the unpruned model only once, this model itself is pruned.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase


@dataclass(frozen=True)
class Run:
    """A run that has read its inputs and measured the unpruned model; :func:`open_run` creates it."""

    source: ModelSource
    resolved: Resolved
    calibration: Windows
    evaluation: Windows
    progress: Progress
    pruner: Pruner
    began: float
    """Time on the monotonic clock at which the run began."""

    def prune(self, index: int) -> Pruned:
        """Prune the model to target ``index``.

        The caller must release the result before the next target is pruned, see :meth:`Pruner.prune`.

        Raises:
            Paused: the listener stopped the run between two steps.
            PruningError: the errors of :func:`open_run`; ``loss_not_finite``, ``ratio_missed``, ``checkpoint_damaged``.
        """
        pruned = self.pruner.prune(index)
        _check_reached(pruned.decoder, self.resolved.ratios[index], self.resolved)
        return pruned

    def report(self, pruned: Pruned, published: Published | None = None) -> Report:
        """Build the report of a pruned model; ``published`` is the size of its files if they are written."""
        report = build_report(
            pruned.decoder,
            self.source,
            self.resolved,
            self.pruner.state,
            pruned.target,
            self.calibration,
            self.evaluation,
        )
        return report.model_copy(update={"seconds": time.monotonic() - self.began, "published": published})


@contextmanager
def open_run(
    model: NamedModel | LoadedModel,
    spec: PruningSpec,
    workspace: Workspace,
    listener: Listener,
    *,
    tokens: Tensor | None = None,
    resume: Mapping[str, Any] | None = None,
    scratch_beside: Path | None = None,
) -> Iterator[Run]:
    """Load a model, read the texts, measure the unpruned model, and prepare the pruning.

    ``tokens`` ``[windows, length]`` are calibration tokens in place of the text that ``spec`` names. ``resume`` is the
    state of a :class:`StepEvent`, from which the run continues. Temporary files are in the workspace's scratch folder,
    or else in a folder in ``scratch_beside``, which is deleted when the context ends.

    Raises:
        PruningError: the model, the texts or the request cannot be used; the error names the field and the allowed
            values.
    """
    if workspace.uploads_dir is None:
        refuse_uploads(spec)
    began, chosen = time.monotonic(), components(spec)
    progress = Progress(listener, spec, chosen)
    progress.stage(Stage.DOWNLOADING)
    state = None if resume is None else RunState.load(dict(resume))
    with ExitStack() as stack:
        stack.enter_context(hub_at(workspace.endpoint))
        scratch = stack.enter_context(tensor_files.folder(workspace.scratch, scratch_beside))
        source, resolved, unpruned = _load(model, spec, chosen, workspace, progress, scratch, state, stack)
        decoder = unpruned.peek()
        progress.weights(weight_bytes(decoder))
        decoder.read_share = READ_SHARE if chosen.dynamic else 0.0
        if "gguf" in spec.formats:
            gguf.check_ready(decoder, source)
        if state is not None:
            _check_resumable(state, source, spec)
        if tokens is not None:
            refuse_tokens(spec)
        calibration, evaluation, suite = _read_inputs(decoder, spec, workspace, progress, tokens)
        for message in _shortfalls(spec, calibration, evaluation, tokens is not None):
            listener.on_event(WarningEvent(message))
        compared = () if spec.vocabulary is None else evaluation_texts(decoder, evaluation)
        measurer = Measurer(evaluation, suite, progress, listener, compared)
        if state is None:
            measured = measurer.measure(decoder)
            baseline = Step(number=0, kind=StepKind.BASELINE, **measured.model_dump(exclude_unset=True))
            state = RunState(**_identity(source, spec), baseline=baseline)
            if spec.vocabulary is not None:
                choice = choose_vocabulary(decoder, spec, workspace)
                kept = VocabularyState(kept=ranges_of(choice.vocabulary.kept), growth=choice.growth)
                state = state.model_copy(update={"vocabulary": kept})
            listener.on_event(StepEvent(baseline, state.as_dict()))
        if state.vocabulary is not None:
            unpruned.cut(Vocabulary(indices_of(state.vocabulary.kept), decoder.shape.vocab_size))
            if "gguf" in spec.formats:
                gguf.check_ready(decoder, source)
            calibration, evaluation, suite = _read_inputs(decoder, spec, workspace, progress, tokens)
            measurer = Measurer(evaluation, suite, progress, listener, compared)
            config, dtype = decoder.model.config.to_dict(), source.dtype
            resolved = resolve(spec, decoder.shape, config=config, source_dtype=dtype, vocabulary_cut=True)
            progress.expect(spec, resolved.components)
        inputs = Inputs(
            resolved, unpruned, calibration.tokens, batch_windows(calibration.tokens), measurer, progress, listener
        )
        pruner: Pruner
        if chosen.dynamic:
            files = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="dynamic.", dir=scratch)))
            pruner = DynamicPruner(inputs, source, files, state)
        else:
            statistics = Statistics(workspace.statistics_dir, _statistics_key(source, resolved, calibration, decoder))
            pruner = StaticPruner(inputs, source, statistics, scratch, state)
        del decoder
        yield Run(source, resolved, calibration, evaluation, progress, pruner, began)


def prune_to_folder(
    model: NamedModel | LoadedModel,
    spec: PruningSpec,
    output_dir: Path,
    workspace: Workspace | None = None,
    listener: Listener | None = None,
    *,
    resume: Mapping[str, Any] | None = None,
    provenance: Callable[[int], Mapping[str, Any]] = lambda index: {},
) -> list[Report]:
    """Prune a model to every target of ``spec`` and write the results to ``output_dir``.

    The results are checked to load without this project. With a list of ratios, each target has a folder ``ratio-R``.
    ``provenance`` returns, for a target's index, the manifest's entries on the origin of the result. ``output_dir`` is
    created only when all files are written and checked.

    Raises:
        PruningError: the errors of :func:`open_run` and :meth:`Run.prune`; ``output_exists``, ``disk_full``,
            ``export_invalid``.
        Paused: the listener stopped the run between two steps.
    """
    if output_dir.exists() and not (output_dir.is_dir() and not any(output_dir.iterdir())):
        raise PruningError(ErrorCode.OUTPUT_EXISTS, f"{output_dir} already exists and is not empty.", field="output")
    workspace, listener = workspace or Workspace(), listener or Listener()
    output_dir.parent.mkdir(parents=True, exist_ok=True)
    with (
        open_run(model, spec, workspace, listener, resume=resume, scratch_beside=output_dir.parent) as run,
        staged(output_dir) as staging,
    ):
        reports = []
        for index, ratio in enumerate(run.resolved.ratios):
            folder = staging / target_folder(ratio) if spec.several else staging
            folder.mkdir(exist_ok=True)
            reports.append(_prune_and_save(run, index, folder, provenance(index)))
    run.progress.done()
    return reports


def _prune_and_save(run: Run, index: int, folder: Path, provenance: Mapping[str, Any]) -> Report:
    """Prune one target and save it.

    The model is released when this function returns, before the next target's model is loaded.
    """
    pruned, spec = run.prune(index), run.resolved.spec
    return save(run, pruned, folder, spec.layout, spec.formats, provenance, enter=run.progress.stage)


def save(
    run: Run,
    pruned: Pruned,
    folder: Path,
    layout: Layout,
    formats: Sequence[Format],
    provenance: Mapping[str, Any],
    enter: Callable[[Stage], None] = lambda stage: None,
) -> Report:
    """Write a pruned model's files into an empty ``folder`` and check that fresh processes compute the same with them.

    ``enter`` is called when exporting and when checking begin.

    Raises:
        PruningError: ``disk_full``, ``export_invalid``, ``gguf_unsupported``, ``gguf_unavailable``; the files must not
            be used then.
    """
    enter(Stage.EXPORTING)
    published = pruned.write(folder, layout, formats)
    report = run.report(pruned, published)
    # The library may save a model in a layout or format that the request does not name.
    report = report.model_copy(update={"spec": {**report.spec, "layout": layout, "formats": list(formats)}})
    write_manifest(pruned.decoder, pruned.plan, folder, report, provenance)
    enter(Stage.CHECKING)
    pruned.check(folder, layout)
    return report


def _load(
    model: NamedModel | LoadedModel,
    spec: PruningSpec,
    chosen: Components,
    workspace: Workspace,
    progress: Progress,
    scratch: Path,
    state: RunState | None,
    stack: ExitStack,
) -> tuple[ModelSource, Resolved, UnprunedModel]:
    if isinstance(model, LoadedModel):
        progress.stage(Stage.LOADING)
        apart = chosen.targets > 1 or chosen.competing
        again = apart or Need.REFERENCE in chosen.needs
        described = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="loaded.", dir=scratch)))
        source = describe_loaded(model.model, model.tokenizer, described, with_weights=again)
        resolved = _resolve(spec, source)
        own = str(model.model.dtype).removeprefix("torch.")
        if resolved.dtype != own:
            raise PruningError(
                ErrorCode.INVALID_REQUEST,
                f"A loaded model is pruned in its own dtype, {own}; allowed: 'auto' or '{own}'. Convert the model first.",
                field="dtype",
            )
        place: Callable[[], Placement] = partial(
            Placement, model.model.device, LayerFiles(scratch) if model.model.device.type == "cpu" else None
        )
        if apart:  # the model is loaded from the files more than once, and the caller's model does not change
            decoder = load(source, "auto", place(), workspace.max_parameters)
        else:
            decoder = adopt(model.model, model.tokenizer, source)
        return source, resolved, UnprunedModel(decoder, lambda: load(source, "auto", place()))
    source = locate(
        model.model_id,
        revision=model.revision if state is None else state.revision or model.revision,
        gguf_file=model.gguf_file,
        models_dir=workspace.models_dir,
        token=workspace.token,
        endpoint=workspace.endpoint,
        allow_paths=workspace.allow_paths,
    )
    if source.sizes_known:  # otherwise the sizes are known only after the download
        resolve(spec, read_shape(source), config=source.config or {}, source_dtype=source.dtype)
    source = download(source, workspace.token, workspace.endpoint, progress.bytes)
    progress.stage(Stage.LOADING)
    resolved = _resolve(spec, source)
    check_size(sizes_of(source), workspace.max_parameters)
    place = choose_placement(resolved, sizes_of(source), workspace, scratch)
    decoder = load(source, spec.dtype, place(), workspace.max_parameters)
    resolve(spec, decoder.shape, config=decoder.model.config.to_dict(), source_dtype=source.dtype)
    return source, resolved, UnprunedModel(decoder, lambda: load(source, spec.dtype, place()))


def _resolve(spec: PruningSpec, source: ModelSource) -> Resolved:
    return resolve(spec, sizes_of(source), config=source.config or {}, source_dtype=source.dtype)


def _read_inputs(
    decoder: Decoder, spec: PruningSpec, workspace: Workspace, progress: Progress, tokens: Tensor | None
) -> tuple[Windows, Windows, Suite]:
    requested = spec.calibration, spec.evaluation
    progress.stage(Stage.CALIBRATING, tokens=sum(each.samples * each.sequence_length for each in requested))
    texts_dir, token, paths = workspace.texts_dir, workspace.token, workspace.allow_paths
    uploads_dir = workspace.uploads_dir
    calibration, evaluation = read_windows(
        decoder,
        spec.calibration,
        spec.evaluation,
        spec.seed,
        texts_dir,
        token,
        progress.share,
        paths,
        tokens,
        uploads_dir,
    )
    texts = read_texts(decoder, spec.evaluation, texts_dir, token, paths, uploads_dir)
    return calibration, evaluation, Suite(spec.evaluation, texts, workspace.tasks_dir)


def _statistics_key(source: ModelSource, resolved: Resolved, calibration: Windows, decoder: Decoder) -> dict[str, Any]:
    """Return everything on which the statistics of the source depend, beside their name."""
    return {
        "fingerprint": source.fingerprint(),
        "source": [source.name, source.gguf_file],
        "dtype": resolved.spec.dtype,
        "vocabulary": None if decoder.vocabulary is None else ranges_of(decoder.vocabulary.vocabulary.kept),
        "tokens": hashlib.sha256(calibration.tokens.cpu().numpy().tobytes()).hexdigest(),
        "seed": resolved.spec.seed,
        "device": decoder.device.type,
        "versions": versions(),
    }


def _check_reached(decoder: Decoder, ratio: float, resolved: Resolved) -> None:
    """Check that the reached ratio differs from the requested ratio by at most one block of channels, or one whole unit.

    Raises:
        PruningError: ``ratio_missed``.
    """
    shape, reached = decoder.shape, decoder.reached_ratio
    largest = block(
        shape.cutting(resolved.components.structures),
        resolved.components.structures,
        resolved.width_multiple,
        resolved.uniform,
    )
    if abs(reached - ratio) * shape.prunable_parameters > largest:
        raise PruningError(ErrorCode.RATIO_MISSED, f"The target ratio {ratio:g} was missed: {reached:.6f} was reached.")


def _identity(source: ModelSource, spec: PruningSpec) -> dict[str, Any]:
    return {"fingerprint": source.fingerprint(), "revision": source.revision, "spec": spec.published()}


def _check_resumable(state: RunState, source: ModelSource, spec: PruningSpec) -> None:
    saved = {"fingerprint": state.fingerprint, "revision": state.revision, "spec": state.spec}
    if saved != _identity(source, spec):
        raise PruningError(
            ErrorCode.SOURCE_CHANGED,
            f"{source.model_id} or the request changed since this run's first steps; start the run anew.",
            field="model_id",
        )


def _shortfalls(spec: PruningSpec, calibration: Windows, evaluation: Windows, given: bool) -> list[str]:
    """Return sentences that say how the texts differ from the request."""
    messages = []
    checked = (("calibration", calibration, spec.calibration), ("evaluation", evaluation, spec.evaluation))
    for name, windows, requested in checked[given:]:
        count, length = windows.tokens.shape
        if count < requested.samples or length < requested.sequence_length:
            wanted = f"{requested.samples} of {requested.sequence_length}"
            messages.append(f"{name}: {count} windows of {length} tokens, where {wanted} were requested.")
    if evaluation.source == SAMPLED != calibration.source:
        messages.append("evaluation: the calibration text is too short to hold any of it out; sampled from the model.")
    return messages
