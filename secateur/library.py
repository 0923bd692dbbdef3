"""The main function of the library: ``prune`` returns a result, which can be saved or pushed to the Hub."""

import json
import shutil
import tempfile
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from rich.console import Console
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from secateur.catalog.gguf import gguf_obstacle
from secateur.catalog.methods import DEFAULT_METHOD
from secateur.catalog.recipe import Recipe
from secateur.catalog.spec import Format, Layout, PruningSpec
from secateur.contract.errors import ErrorCode, PruningError
from secateur.contract.events import Event, ProgressEvent, StepEvent, WarningEvent
from secateur.contract.report import Report
from secateur.engine.export import gguf, staged
from secateur.engine.measure.data import read_data
from secateur.engine.model.plan import Plan
from secateur.engine.run.pruner import Pruned
from secateur.engine.run.run import LoadedModel, NamedModel, Run, open_run, save
from secateur.engine.run.workspace import Listener, Workspace
from secateur.files import write_whole
from secateur.hubs import HuggingFaceHub, publish
from secateur.settings import get_settings
from secateur.terminal_progress import TerminalProgress

STATE = "state.json"


class Paused(KeyboardInterrupt):
    """Ctrl-C stopped a run after at least one complete step; ``prune(…, resume=folder)`` continues after that step."""

    def __init__(self, folder: Path, step: int) -> None:
        super().__init__(
            f"Stopped after step {step}. The complete steps are in {folder}; go on with resume='{folder}'."
        )
        self.folder = folder
        self.step = step


class Result:
    """A pruned model in memory, with its tokenizer, its report and its plan.

    A result of an iterator is closed when the iterator continues: the model is released, and the report and the plan
    stay.
    """

    def __init__(self, run: Run, pruned: Pruned, resources: "_Resources") -> None:
        self.tokenizer: PreTrainedTokenizerBase = pruned.decoder.tokenizer
        """The tokenizer of the source, or what the request's ``vocabulary`` left of it."""
        self.report: Report = run.report(pruned)
        """The report of the pruned model: the figures before and after pruning."""
        self.plan: Plan = pruned.plan
        """The plan: the units of the source that each layer keeps."""
        self._run, self._resources = run, resources
        self._pruned: Pruned | None = pruned

    @property
    def model(self) -> PreTrainedModel:
        """The pruned model.

        Raises:
            RuntimeError: The result was closed.
        """
        return self._open.decoder.model

    def close(self) -> None:
        """Release the model; the report and the plan stay."""
        self._pruned = None

    @property
    def _open(self) -> Pruned:
        if self._pruned is None:
            raise RuntimeError("The model of this result was released; save a result before the iterator goes on.")
        return self._pruned

    def __repr__(self) -> str:
        ratio, size = self.report.ratio.reached, self.report.parameters.after
        return f"<{type(self).__name__} {self.report.source.model_id}, {ratio:.1%} pruned, {size:,} parameters>"

    def save(
        self, folder: Path | str, *, layout: Layout | None = None, formats: Sequence[Format] | None = None
    ) -> Path:
        """Write the model to ``folder``, and check that a process without this project computes the same with it.

        ``layout`` and ``formats`` default to those of the recipe. The folder must not exist or must be empty; it is
        created only after everything is written and checked.

        Raises:
            PruningError: ``output_exists``, ``invalid_request`` (the layout does not suit the pruned model),
                ``disk_full``, ``gguf_unsupported``, ``gguf_unavailable``, ``export_invalid``.
        """
        folder = Path(folder)
        if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
            raise PruningError(ErrorCode.OUTPUT_EXISTS, f"{folder} already exists and is not empty.", field="folder")
        spec = self._spec_for(layout, formats)
        folder.parent.mkdir(parents=True, exist_ok=True)
        with staged(folder) as staging:
            self._save(staging, spec, {})
        return folder

    def push_to_hub(
        self,
        repo_id: str,
        *,
        private: bool = True,
        token: str | None = None,
        layout: Layout | None = None,
        formats: Sequence[Format] | None = None,
    ) -> str:
        """Publish the model in one commit, which replaces the files of the repository; return the commit's URL.

        A repository that does not exist is created, ``private`` or public. ``token`` defaults to ``HF_TOKEN``.

        Raises:
            PruningError: An error of :meth:`save`, or ``hub_forbidden``, ``hub_refused``, ``hub_unavailable``,
                ``hub_conflict``.
        """
        spec, settings = self._spec_for(layout, formats), get_settings()
        hub = HuggingFaceHub(token or _secret(settings.hf_token), settings.hf_endpoint)
        with tempfile.TemporaryDirectory(prefix="secateur-") as temporary:
            folder = Path(temporary, "model")
            folder.mkdir()
            self._save(folder, spec, {"repo_id": repo_id})
            commit = publish(hub, repo_id, private, folder, f"Pruned model {Path(temporary).name}")
        return hub.url(repo_id, commit)

    def _save(self, folder: Path, spec: PruningSpec, provenance: Mapping[str, Any]) -> None:
        save(self._run, self._open, folder, spec.layout, spec.formats, provenance)

    def _spec_for(self, layout: Layout | None, formats: Sequence[Format] | None) -> PruningSpec:
        """Return the request with this layout and these formats.

        Raises:
            PruningError: The pruned model does not allow the layout or a format.
        """
        spec = self._run.resolved.spec
        changes = {"layout": layout, "formats": None if formats is None else list(formats)}
        wanted = Recipe(spec.model_dump()).override(changes).spec()
        decoder = self._open.decoder
        if wanted.layout == "uniform" and len(set(decoder.widths)) > 1:
            raise PruningError(
                ErrorCode.INVALID_REQUEST,
                "The layers differ in width, so the layout 'uniform' does not fit; allowed: 'per-layer', 'padded', or pruning with "
                "a recipe whose layout is 'uniform'.",
                field="layout",
            )
        if wanted.layout != "per-layer" and decoder.shape.differs_in_kind:
            raise PruningError(
                ErrorCode.INVALID_REQUEST,
                f"The layers differ in more than width, so the layout '{wanted.layout}' does not fit; allowed: 'per-layer'.",
                field="layout",
            )
        if "gguf" in wanted.formats:
            obstacle = gguf_obstacle(
                decoder.shape,
                decoder.model.config.to_dict(),
                wanted.gguf_quantization,
                uniform=wanted.layout != "per-layer" or len(set(decoder.widths)) == 1,
                added_biases=self._run.resolved.components.layerwise.adds_bias,
                width_multiple=wanted.allocation.width_multiple,
            )
            if obstacle is not None:
                raise obstacle
            gguf.check_ready(decoder, self._run.source)
        return wanted


def prune(
    model: str | Path | PreTrainedModel,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    ratio: float | Sequence[float] | None = None,
    goal: Mapping[str, float] | None = None,
    method: str | None = None,
    rounds: int | None = None,
    data: Any = None,
    evaluation: Any = None,
    recipe: Recipe | Mapping[str, Any] | str | Path | None = None,
    device: str | None = None,
    progress: bool = True,
    on_event: Callable[[Event], None] | None = None,
    resume: Path | str | None = None,
) -> Any:
    """Prune a model and return the result.

    ``model`` is a Hub id, a folder, a GGUF file, ``local:NAME``, or a loaded transformers model. With one ratio, a
    loaded model is pruned in place, on its device and in its dtype. With several ratios, or with structures
    that compete, the loaded model is not changed, and each result is a copy. With the method ``dsgp``, a loaded model is not changed either: ``result.model``
    is the dynamic model, another object than the model that was passed. ``tokenizer`` is the tokenizer of a loaded model; by default, it is loaded from
    the place that the model was loaded from.

    ``ratio`` is the request's ``target_ratio``: the share of the attention and feed-forward weights to remove. ``goal``
    is a size instead of a ratio, ``{"parameters": N}`` or ``{"bytes": N}``. ``method`` defaults to the recipe's method,
    or else to ``secateur``. ``data`` is the calibration data, and ``evaluation`` is the evaluation text: texts, the
    name of a data set, a text file, chats, a ``datasets.Dataset``, or, for ``data`` only, a DataLoader of token ids
    ``[batch, length]``. Without ``data``, the model generates its own calibration text. ``recipe`` is a file or an
    object with fields of a job request; the other arguments override its fields.

    ``progress`` draws a progress bar on a terminal. ``on_event`` is called with every event of
    :mod:`secateur.contract.events`. Ctrl-C raises :class:`Paused` after the first complete step, and ``resume`` takes
    the folder that the exception names.

    The function returns a :class:`Result`. With a list of ratios, it returns an iterator of results, which holds one
    model in memory at a time: a result is closed when the iterator continues.

    Raises:
        PruningError: The error names the argument or the request's field at fault, and what is allowed.
        Paused: Ctrl-C stopped the run after at least one complete step.
    """
    chosen = _recipe(recipe).override(
        {
            "target_ratio": list(ratio) if isinstance(ratio, list | tuple) else ratio,
            "goal": goal,
            "method": method,
            "rounds": rounds,
        }
    )
    if "method" not in chosen.fields:
        chosen = chosen.override({"method": DEFAULT_METHOD})
    named = _model(model, tokenizer, chosen)
    own_tokenizer = named.tokenizer if isinstance(named, LoadedModel) else tokenizer
    tokens: Tensor | None = None
    for field, argument, given in (("calibration", "data", data), ("evaluation", "evaluation", evaluation)):
        if given is None:
            continue
        read = read_data(given, own_tokenizer, argument)
        if isinstance(read, Tensor):
            if field == "evaluation":
                raise PruningError(ErrorCode.INVALID_REQUEST, "evaluation takes texts, not token ids.", field=argument)
            tokens = read
        else:
            others = {
                name: value
                for name, value in dict(chosen.fields.get(field) or {}).items()
                if name not in ("texts", "dataset")
            }
            chosen = Recipe({**chosen.fields, field: {**others, **read}})
    spec = chosen.spec()
    runs = _runs(named, spec, tokens, device, progress, on_event, resume)
    return runs if spec.several else next(runs)


def _runs(
    model: NamedModel | LoadedModel,
    spec: PruningSpec,
    tokens: Tensor | None,
    device: str | None,
    progress: bool,
    on_event: Callable[[Event], None] | None,
    resume: Path | str | None,
) -> Iterator[Result]:
    folder, state = _saved(resume)
    done = 0 if state is None else int(state.get("step", 0))
    settings, resources = get_settings(), _Resources()
    workspace = Workspace(
        models_dir=settings.models_dir,
        texts_dir=settings.texts_dir,
        tasks_dir=settings.tasks_dir,
        scratch=folder,
        token=_secret(settings.hf_token),
        endpoint=settings.hf_endpoint,
        device=device,
    )
    show, paused = _Show(progress), False

    def listen(event: Event) -> None:
        nonlocal done
        if isinstance(event, StepEvent):
            write_whole(folder / STATE, json.dumps(event.state).encode())
            done = event.step.number
        show(event)
        if on_event is not None:
            on_event(event)

    resources.stack.callback(lambda: None if paused else shutil.rmtree(folder, ignore_errors=True))
    try:
        with show:
            opened = open_run(model, spec, workspace, Listener(listen), tokens=tokens, resume=state)
            run = resources.stack.enter_context(opened)
            del model  # the run owns a loaded model from here on
        for index in range(len(run.resolved.ratios)):
            with show:
                result = Result(run, run.prune(index), resources)
            yield result
            result.close()
    except BaseException as error:
        interrupted = isinstance(error, KeyboardInterrupt) and done > 0
        paused = interrupted or (resume is not None and isinstance(error, Exception))
        if not isinstance(error, GeneratorExit):
            resources.stack.close()
        if interrupted:
            raise Paused(folder, done) from None
        raise


class _Resources:
    """Temporary files that are needed to save results, and that are deleted with the last result."""

    def __init__(self) -> None:
        self.stack = ExitStack()
        weakref.finalize(self, self.stack.close)


class _Show:
    """Shows a run on a terminal's stderr: warnings always, progress bars where they are requested."""

    def __init__(self, bars: bool) -> None:
        self._console = Console(stderr=True)
        self._wanted = bars
        self._bars: TerminalProgress | None = None

    def __enter__(self) -> None:
        self._bars = TerminalProgress(self._console).__enter__() if self._wanted else None

    def __exit__(self, *error: object) -> None:
        if self._bars is not None:
            self._bars.__exit__(*error)

    def __call__(self, event: Event) -> None:
        if isinstance(event, WarningEvent):
            self._console.print(f"warning: {event.message}", markup=False)
        if isinstance(event, ProgressEvent) and self._bars is not None:
            self._bars.show(event, event.remaining_seconds)


def _saved(resume: Path | str | None) -> tuple[Path, dict[str, Any] | None]:
    """Return the folder that keeps the run's complete steps, and the state that the run resumes from.

    Raises:
        PruningError: ``state_invalid`` if the folder holds no run that can be resumed.
    """
    if resume is None:
        return Path(tempfile.mkdtemp(prefix="secateur-run-")), None
    folder = Path(resume)
    try:
        state: dict[str, Any] = json.loads((folder / STATE).read_text())
    except (OSError, ValueError) as error:
        raise PruningError(
            ErrorCode.STATE_INVALID, f"{folder} holds no run that can be resumed: {error}", field="resume"
        ) from None
    return folder, state


def _recipe(recipe: Recipe | Mapping[str, Any] | str | Path | None) -> Recipe:
    if recipe is None:
        return Recipe({})
    if isinstance(recipe, Recipe):
        return recipe
    if isinstance(recipe, Mapping):
        return Recipe(dict(recipe))
    if isinstance(recipe, str | Path):
        return Recipe.load(recipe)
    raise PruningError(
        ErrorCode.INVALID_REQUEST,
        f"recipe is a {type(recipe).__name__}; allowed: the path of a YAML or JSON file, a mapping, or a Recipe.",
        field="recipe",
    )


def _model(model: Any, tokenizer: Any, recipe: Recipe) -> NamedModel | LoadedModel:
    if isinstance(model, PreTrainedModel):
        return LoadedModel(model, _tokenizer(model, tokenizer))
    if not isinstance(model, str | Path):
        raise PruningError(
            ErrorCode.INVALID_REQUEST,
            f"model is a {type(model).__name__}; allowed: a Hub id, the path of a folder or GGUF file, 'local:NAME', or a loaded "
            "transformers.PreTrainedModel.",
            field="model",
        )
    if tokenizer is not None:
        raise PruningError(
            ErrorCode.INVALID_REQUEST,
            "tokenizer belongs to a loaded model; a named model has its own.",
            field="tokenizer",
        )
    return NamedModel(str(model), recipe.fields.get("revision"), recipe.fields.get("gguf_file"))


def _tokenizer(model: PreTrainedModel, tokenizer: Any) -> PreTrainedTokenizerBase:
    if isinstance(tokenizer, PreTrainedTokenizerBase):
        return tokenizer
    if tokenizer is not None:
        raise PruningError(
            ErrorCode.INVALID_REQUEST,
            f"tokenizer is a {type(tokenizer).__name__}; allowed: a transformers tokenizer.",
            field="tokenizer",
        )
    try:
        found: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(model.config.name_or_path)
    except Exception as error:  # the loaders do not wrap the exceptions of their parsers
        raise PruningError(
            ErrorCode.TOKENIZER_MISSING,
            f"The loaded model does not say where its tokenizer is ({error}); give tokenizer=.",
            field="tokenizer",
        ) from None
    return found


def _secret(token: Any) -> str | None:
    return token.get_secret_value() if token is not None else None
