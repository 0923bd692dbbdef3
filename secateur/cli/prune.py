"""The commands that work on this machine without a service: prune, inspect."""

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NamedTuple

import typer

from secateur.catalog.recipe import Recipe, RecipeInvalid
from secateur.cli.common import FAILED, INTERRUPTED, REFUSED, Json, stop
from secateur.cli.options import takes_recipe, with_method
from secateur.contract.errors import PruningError
from secateur.extras import MissingExtra, require

if TYPE_CHECKING:
    from secateur.catalog.architectures import ModelShape
    from secateur.catalog.sources import ModelSource
    from secateur.catalog.spec import PruningSpec
    from secateur.contract.events import Event
    from secateur.contract.report import Report


def inspect(
    model: Annotated[str, typer.Argument(help="A Hub id, 'local:NAME', or a folder.")],
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit.")] = None,
    gguf_file: Annotated[str | None, typer.Option(help="Read the weights from this GGUF file of the model.")] = None,
    as_json: Json = False,
) -> None:
    """Show a model's sizes, and the sizes and layouts that the pruned model can have, from the config alone."""
    from secateur.catalog.inspection import layouts, sizes, structures
    from secateur.catalog.sources import locate
    from secateur.settings import get_settings

    settings = get_settings()
    try:
        source = locate(
            model,
            revision=revision,
            gguf_file=gguf_file,
            models_dir=settings.models_dir,
            token=settings.hf_token.get_secret_value() if settings.hf_token else None,
            endpoint=settings.hf_endpoint,
            allow_paths=True,
        )
        shape = _sizes(source)
    except MissingExtra:
        raise
    except PruningError as error:
        raise stop(_explained(error), FAILED) from None
    made, possible = sizes(shape, source.dtype), layouts(shape, source.config or {})
    units = structures(shape, source.config or {})
    if as_json:
        found = {
            "model_id": model,
            "revision": source.revision,
            "shape": shape.as_dict(),
            "sizes": [size.model_dump() for size in made],
            "layouts": [each.model_dump() for each in possible],
            "structures": [each.model_dump() for each in units],
        }
        typer.echo(json.dumps(found))
        return
    layers = shape.layers
    groups, heads, channels = (
        _range([getattr(layer, size) for layer in layers]) for size in ("kv_groups", "heads", "channels_per_expert")
    )
    of_experts = f"{_range([layer.experts for layer in layers])} experts, a token {shape.experts_per_token}, of "
    experts = of_experts if shape.family.experts else ""
    typer.echo(f"{model}: family {shape.family.name}, type {shape.model_type}, {shape.parameters:,} parameters")
    typer.echo(
        f"{len(layers)} layers of {groups} KV groups ({heads} heads of {shape.stock_layer.head_dim}) and "
        f"{experts}{channels} feed-forward channels: {shape.prunable_parameters:,} parameters can be pruned"
    )
    typer.echo(
        f"{shape.vocab_size:,} tokens, whose embedding and head are {shape.vocabulary_parameters / shape.parameters:.1%} of "
        "all parameters; the setting 'vocabulary' removes those that a kind of text does not need"
    )
    for size in made:
        typer.echo(
            f"pruned by {size.nearest_ratio:.1%}: {size.parameters:,} parameters, {size.bytes / 1e6:,.1f} MB in {source.dtype}"
        )
    for unit in units:
        if unit.reason is not None:
            typer.echo(f"structure {unit.structure}: {unit.reason}")
        elif unit.max_ratio is not None:
            typer.echo(
                f"structure {unit.structure}: {unit.units:,} units, at most {unit.max_ratio:.1%}; without code in "
                f"{', '.join(unit.without_code)}; GGUF: {', '.join(unit.gguf) or 'none'}"
            )
    told: set[str] = set()
    for each in possible:
        files = ", ".join(each.gguf) or "none"
        typer.echo(f"layout {each.layout}: at most {each.max_ratio:.1%}; GGUF: {files}")
        if each.gguf_reason is not None and each.gguf_reason not in told:
            typer.echo(f"  {each.gguf_reason}")
            told.add(each.gguf_reason)


def _sizes(source: "ModelSource") -> "ModelShape":
    """Return a model's sizes from its config alone; transformers builds a model whose type has no adapter."""
    from secateur.catalog.sources import read_shape

    if source.sizes_known:
        return read_shape(source)
    require("engine", "Inspecting a model of a type without an adapter")
    from secateur.engine.model.generic import sizes_of

    return sizes_of(source)


@takes_recipe
def prune(
    recipe: Recipe,
    output: Annotated[
        Path, typer.Option(file_okay=False, help="Folder for the result; it must not exist or be empty.")
    ],
    as_json: Json = False,
) -> None:
    """Prune a model on this machine, without the service.

    After Ctrl-C, the same command continues after the last complete step.
    """
    from secateur.catalog.spec import target_folder

    recipe = with_method(recipe)
    try:
        spec = recipe.spec()
    except RecipeInvalid as error:
        raise stop(error.message, REFUSED) from None
    model_id = recipe.fields.get("model_id")
    if not model_id:
        raise stop("model_id: give MODEL, or a recipe with 'model_id'", REFUSED)
    if output.exists() and any(output.iterdir()):
        raise stop(f"{output} is not empty", REFUSED)
    if unused := recipe.service_fields:
        typer.echo(f"warning: only the service uses these fields of the recipe: {', '.join(unused)}", err=True)
    reports = _prune(
        NamedRequest(model_id, recipe.fields.get("revision"), recipe.fields.get("gguf_file")), spec, output
    )
    if as_json:
        found = [report.as_dict() for report in reports]
        typer.echo(json.dumps({"targets": found} if spec.several else found[0]))
        return
    for report in reports:
        _show(output / target_folder(report.ratio.target) if spec.several else output, report)


class NamedRequest(NamedTuple):
    """The requested model, and how to read the model."""

    model_id: str
    revision: str | None
    gguf_file: str | None


def _prune(model: NamedRequest, spec: "PruningSpec", output: Path) -> "list[Report]":
    """Prune a model into ``output``, and keep the complete steps beside ``output`` until the model is written."""
    require("engine", "Pruning on this machine")
    from secateur.contract.events import Event, StepEvent
    from secateur.engine.run.run import NamedModel, prune_to_folder
    from secateur.engine.run.workspace import Listener, Workspace
    from secateur.files import write_whole
    from secateur.settings import get_settings

    settings, show = get_settings(), _Progress()
    run_folder = output.absolute().with_name(f".{output.name}.run")
    saved = run_folder / "state.json"
    state = json.loads(saved.read_text()) if saved.is_file() else None
    if state is not None:
        typer.echo(f"Resuming after step {state.get('step')}, from {run_folder}.", err=True)

    def listen(event: Event) -> None:
        if isinstance(event, StepEvent):
            write_whole(saved, json.dumps(event.state).encode())
        show(event)

    workspace = Workspace(
        models_dir=settings.models_dir,
        texts_dir=settings.texts_dir,
        tasks_dir=settings.tasks_dir,
        scratch=run_folder,
        token=settings.hf_token.get_secret_value() if settings.hf_token else None,
        endpoint=settings.hf_endpoint,
    )
    run_folder.mkdir(parents=True, exist_ok=True)
    try:
        with show:
            reports = prune_to_folder(NamedModel(*model), spec, output, workspace, Listener(listen), resume=state)
    except PruningError as error:
        if not saved.is_file():
            shutil.rmtree(run_folder, ignore_errors=True)
        raise stop(_explained(error), FAILED) from None
    except KeyboardInterrupt:
        if not saved.is_file():
            shutil.rmtree(run_folder, ignore_errors=True)
            raise stop("Stopped before the first step was complete.", INTERRUPTED) from None
        message = f"Stopped. The complete steps are in {run_folder}: the same command goes on after them; delete it to start anew."
        raise stop(message, INTERRUPTED) from None
    shutil.rmtree(run_folder, ignore_errors=True)
    return reports


def _explained(error: PruningError) -> str:
    return f"{error.field}: {error.message} ({error.code})" if error.field else f"{error.message} ({error.code})"


def _show(folder: Path, report: "Report") -> None:
    typer.echo(f"{folder}: {report.parameters.after:,} of {report.parameters.before:,} parameters")
    typer.echo(f"ratio {report.ratio.reached:.4f}")
    before, after = (
        "infinite" if value is None else f"{value:.2f}" for value in (report.perplexity.before, report.perplexity.after)
    )
    typer.echo(f"perplexity {before} -> {after}")


class _Progress:
    """A display of the engine's events on stderr: progress bars on a terminal, else one line for each stage."""

    def __init__(self) -> None:
        from rich.console import Console

        from secateur.terminal_progress import TerminalProgress

        console = Console(stderr=True)
        self._bars = TerminalProgress(console)
        self._lines = not console.is_terminal
        self._last = ""

    def __enter__(self) -> None:
        self._bars.__enter__()

    def __exit__(self, *error: object) -> None:
        self._bars.__exit__(*error)

    def __call__(self, event: "Event") -> None:
        from secateur.contract.events import ProgressEvent, WarningEvent
        from secateur.terminal_progress import where

        if isinstance(event, WarningEvent):
            typer.echo(f"warning: {event.message}", err=True)
        if not isinstance(event, ProgressEvent):
            return
        self._bars.show(event, event.remaining_seconds)
        if self._lines and where(event) != self._last:
            typer.echo(f"{where(event)} ({event.share:.0%})", err=True)
        self._last = where(event)


def _range(sizes: list[int]) -> str:
    """Return the sizes of layers as text: one number, or the least and the most."""
    least, most = min(sizes), max(sizes)
    return str(most) if least == most else f"{least} to {most}"
