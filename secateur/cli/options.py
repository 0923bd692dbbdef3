"""The options that say how to prune.

The options and their defaults are the same for a job of the service and for pruning on this machine.
"""

import functools
import inspect
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from secateur.catalog.methods import DEFAULT_METHOD
from secateur.catalog.recipe import Recipe, RecipeInvalid
from secateur.catalog.spec import LONGEST_TEXT
from secateur.cli.common import REFUSED, stop


def _options(
    model: Annotated[
        str | None, typer.Argument(help="A Hub id, 'local:NAME', or, for 'prune', a folder. Unset: the recipe's.")
    ] = None,
    recipe: Annotated[
        Path | None,
        typer.Option(
            help="A YAML or JSON file with fields of a job request; '-' is standard input. Options go before it."
        ),
    ] = None,
    ratio: Annotated[
        list[float] | None,
        typer.Option(help="Share of the blocks' weights to remove, 0 to 0.9; several make a model each."),
    ] = None,
    method: Annotated[str | None, typer.Option(help=f"See GET /v1/methods.  [default: {DEFAULT_METHOD}]")] = None,
    rounds: Annotated[int | None, typer.Option(help="Pruning rounds. Unset: the method's default.")] = None,
    recovery: Annotated[str | None, typer.Option(help="Layer-wise recovery. Unset: the method's own.")] = None,
    training: Annotated[str | None, typer.Option(help="Training afterwards: lora or distill. Unset: none.")] = None,
    calibration: Annotated[
        str | None, typer.Option(help="A data set or text file. Unset: text that the model generates.")
    ] = None,
    evaluation: Annotated[
        str | None, typer.Option(help="A data set or text file. Unset: a part of the calibration text is held out.")
    ] = None,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit.")] = None,
    gguf_file: Annotated[str | None, typer.Option(help="Read the weights from this GGUF file of the model.")] = None,
    dtype: Annotated[str | None, typer.Option(help="auto, float32, bfloat16 or float16.  [default: auto]")] = None,
    seed: Annotated[int | None, typer.Option(help="[default: 0]")] = None,
    layout: Annotated[str | None, typer.Option(help="per-layer, uniform or padded.  [default: per-layer]")] = None,
    gguf: Annotated[str | None, typer.Option(help="Also write a GGUF file: F32, F16, Q8_0 or Q4_K_M.")] = None,
) -> Recipe:
    """Return the recipe that the options make; an option overrides the recipe file's field."""
    try:
        base = Recipe({}) if recipe is None else _read(recipe)
    except RecipeInvalid as error:
        raise stop(error.message, REFUSED) from None
    given = {
        "model_id": model,
        "target_ratio": ratio[0] if ratio and len(ratio) == 1 else ratio or None,
        "method": method,
        "rounds": rounds,
        "recovery": _given({"layerwise": _given({"kind": recovery}), "training": _given({"kind": training})}),
        "calibration": _text_source(calibration),
        "evaluation": _text_source(evaluation),
        "revision": revision,
        "gguf_file": gguf_file,
        "dtype": dtype,
        "seed": seed,
        "layout": layout,
        "formats": ["safetensors", "gguf"] if gguf else None,
        "gguf_quantization": gguf,
    }
    return base.override(given)


def with_method(recipe: Recipe) -> Recipe:
    """Return the recipe with the default method if it names none."""
    return recipe if "method" in recipe.fields else recipe.override({"method": DEFAULT_METHOD})


def takes_recipe(command: Callable[..., None]) -> Callable[..., None]:
    """Add the shared options to ``command``, whose first parameter is the :class:`Recipe` that the options make."""
    shared = inspect.signature(_options).parameters.values()
    own = [parameter for parameter in inspect.signature(command).parameters.values() if parameter.name != "recipe"]
    names = [parameter.name for parameter in shared]

    @functools.wraps(command)
    def run(**values: Any) -> None:
        command(_options(**{name: values.pop(name) for name in names}), **values)

    parameters = [parameter.replace(kind=parameter.KEYWORD_ONLY) for parameter in (*shared, *own)]
    run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return run


def _read(path: Path) -> Recipe:
    return Recipe.parse(sys.stdin.read()) if str(path) == "-" else Recipe.load(path)


def _given(fields: dict[str, Any]) -> dict[str, Any] | None:
    """Return the fields that are set, or ``None`` if no field is set."""
    return {name: value for name, value in fields.items() if value is not None} or None


def _text_source(name: str | None) -> dict[str, Any] | None:
    """Return a file's text in pieces that a request may hold, or the name of a data set if there is no such file."""
    if name is None:
        return None
    if not Path(name).is_file():
        return {"dataset": name}
    try:
        text = Path(name).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise stop(f"{name} cannot be read as UTF-8 text: {error}", REFUSED) from None
    return {"texts": [text[start : start + LONGEST_TEXT] for start in range(0, len(text), LONGEST_TEXT)]}
