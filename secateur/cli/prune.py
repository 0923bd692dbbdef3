"""The commands that work on this machine without a service: prune, inspect."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from secateur.cli.common import FAILED, REFUSED, Json, need, stop
from secateur.cli.jobs import RecoveryKind, one_or_several

if TYPE_CHECKING:
    from secateur.contract.errors import PruningError


def inspect(
    model: Annotated[str, typer.Argument(help="A Hub id, 'local:NAME', or a folder.")],
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit.")] = None,
    gguf_file: Annotated[str | None, typer.Option(help="Of the model's, this GGUF file.")] = None,
    as_json: Json = False,
) -> None:
    """Tell what a model is made of and what can be made of it, from its config alone."""
    from secateur.catalog.inspection import layouts, sizes
    from secateur.catalog.sources import locate, read_shape
    from secateur.contract.errors import PruningError
    from secateur.extras import MissingExtra
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
        if source.config is None or source.sizes_known:
            shape = read_shape(source)
        else:
            need("engine", f"Inspecting a model of type {source.config.get('model_type')!r}")
            from secateur.engine.model.generic import sizes_of

            shape = sizes_of(source)
    except MissingExtra as error:
        raise stop(error.message, REFUSED) from None
    except PruningError as error:
        raise stop(_explained(error), FAILED) from None
    made, possible = sizes(shape, source.dtype), layouts(shape, source.config or {})
    if as_json:
        found = {
            "model_id": model,
            "revision": source.revision,
            "shape": shape.as_dict(),
            "sizes": [size.model_dump() for size in made],
            "layouts": [each.model_dump() for each in possible],
        }
        typer.echo(json.dumps(found))
        return
    first, count = shape.layers[0], len(shape.layers)
    experts = f"{first.experts} experts, a token {shape.experts_per_token}, of " if shape.family.experts else ""
    typer.echo(f"{model}: family {shape.family.name}, type {shape.model_type}, {shape.parameters:,} parameters")
    typer.echo(
        f"{count} layers of {first.kv_groups} KV groups ({first.heads} heads of {first.head_dim}) and "
        f"{experts}{first.channels_per_expert} feed-forward channels: {shape.prunable_parameters:,} parameters can be pruned"
    )
    for size in made:
        typer.echo(
            f"pruned by {size.nearest_ratio:.1%}: {size.parameters:,} parameters, {size.bytes / 1e6:,.1f} MB in {source.dtype}"
        )
    told: set[str] = set()
    for each in possible:
        files = ", ".join(each.gguf) or "none"
        typer.echo(f"layout {each.layout}: at most {each.max_ratio:.1%}; GGUF: {files}")
        if each.gguf_reason is not None and each.gguf_reason not in told:
            typer.echo(f"  {each.gguf_reason}")
            told.add(each.gguf_reason)


def prune(
    model: Annotated[str, typer.Argument(help="A Hub id, 'local:NAME', or a folder.")],
    ratio: Annotated[
        list[float], typer.Option(help="Share of the prunable parameters to remove; several make a model each.")
    ],
    output: Annotated[Path, typer.Option(file_okay=False, help="Folder for what is made; must not exist or be empty.")],
    method: Annotated[str, typer.Option(help="See GET /v1/methods.")] = "piem-lsps",
    rounds: Annotated[int | None, typer.Option(help="Unset: the method's default.")] = None,
    recovery: RecoveryKind = None,
    calibration: Annotated[
        str | None, typer.Option(help="A data set or text file; unset: the model's own text.")
    ] = None,
    evaluation: Annotated[str | None, typer.Option(help="A data set or text file, held out.")] = None,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit.")] = None,
    gguf_file: Annotated[str | None, typer.Option(help="Read the weights from this GGUF file of the model.")] = None,
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")] = "auto",
    seed: Annotated[int, typer.Option()] = 0,
    layout: Annotated[str, typer.Option(help="per-layer, uniform or padded.")] = "per-layer",
    gguf: Annotated[str | None, typer.Option(help="Also a GGUF file: F32, F16, Q8_0 or Q4_K_M.")] = None,
    as_json: Json = False,
) -> None:
    """Prune a model here and now, without the service."""
    from pydantic import ValidationError

    from secateur.catalog.spec import PruningSpec, target_folder
    from secateur.contract.errors import PruningError
    from secateur.settings import get_settings

    try:
        spec = PruningSpec.model_validate(
            {
                "target_ratio": one_or_several(ratio),
                "method": method,
                "rounds": rounds,
                "seed": seed,
                "dtype": dtype,
                "calibration": _text_source(calibration),
                "evaluation": _text_source(evaluation),
                "recovery": {"kind": recovery},
                "layout": layout,
                **({"formats": ["safetensors", "gguf"], "gguf_quantization": gguf} if gguf else {}),
            }
        )
    except ValidationError as error:
        reasons = (
            f"{'.'.join(map(str, at['loc']))}: {at['msg'].removeprefix('Value error, ')}".removeprefix(": ")
            for at in error.errors()
        )
        raise stop("\n".join(reasons), REFUSED) from None
    if output.exists() and any(output.iterdir()):
        raise stop(f"{output} is not empty", REFUSED)

    need("engine", "Pruning on this machine")
    from secateur.engine import prune as prune_model

    settings = get_settings()
    show = _Progress()
    try:
        with show:
            result = prune_model(
                model,
                spec,
                output,
                revision=revision,
                gguf_file=gguf_file,
                models_dir=settings.models_dir,
                texts_dir=settings.texts_dir,
                tasks_dir=settings.tasks_dir,
                token=settings.hf_token.get_secret_value() if settings.hf_token else None,
                endpoint=settings.hf_endpoint,
                on_event=show,
            )
    except PruningError as error:
        raise stop(_explained(error), FAILED) from None
    report = result.report
    if as_json:
        typer.echo(json.dumps(report))
        return
    if "targets" not in report:
        _show(output, report)
    for target in report.get("targets", ()):
        _show(output / target_folder(target["ratio"]["target"]), target)


def _explained(error: "PruningError") -> str:
    return f"{error.field}: {error.message} ({error.code})" if error.field else f"{error.message} ({error.code})"


def _show(folder: Path, report: dict[str, Any]) -> None:
    typer.echo(f"{folder}: {report['parameters']['after']:,} of {report['parameters']['before']:,} parameters")
    typer.echo(f"ratio {report['ratio']['reached']:.4f}")
    before, after = (
        "infinite" if value is None else f"{value:.2f}"
        for value in (report["perplexity"]["before"], report["perplexity"]["after"])
    )
    typer.echo(f"perplexity {before} -> {after}")


def _text_source(name: str | None) -> dict[str, Any]:
    """A file's text in the pieces that a request may hold, or the data set of that name."""
    if name is None or not Path(name).is_file():
        return {"dataset": name}
    try:
        text = Path(name).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise stop(f"{name} cannot be read as UTF-8 text: {error}", REFUSED) from None
    return {"texts": [text[start : start + 1_000_000] for start in range(0, len(text), 1_000_000)]}


class _Progress:
    """The engine's events on stderr: bars on a terminal, else a line a stage."""

    def __init__(self) -> None:
        from rich.console import Console

        from secateur.cli.terminal_progress import TerminalProgress

        console = Console(stderr=True)
        self._bars = TerminalProgress(console)
        self._lines = not console.is_terminal
        self._last = ""

    def __enter__(self) -> None:
        self._bars.__enter__()

    def __exit__(self, *error: object) -> None:
        self._bars.__exit__(*error)

    def __call__(self, event: dict[str, Any]) -> None:
        from secateur.cli.terminal_progress import where

        if event["type"] == "warning":
            typer.echo(f"warning: {event['message']}", err=True)
        if event["type"] != "progress":
            return
        self._bars.show(event, event["remaining_seconds"])
        if self._lines and where(event) != self._last:
            typer.echo(f"{where(event)} ({event['share']:.0%})", err=True)
        self._last = where(event)
