"""Runs of the engine for the tests, with events and reports as the plain data that travels."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from secateur.catalog.architectures import ModelShape
from secateur.catalog.budget import whole_units
from secateur.catalog.resolve import Resolved, components
from secateur.catalog.spec import PruningSpec
from secateur.contract.events import Event, StepEvent
from secateur.engine.run.run import NamedModel, prune_to_folder
from secateur.engine.run.workspace import Listener, Workspace


@dataclass(frozen=True)
class Pruned:
    """The folder that was written, and the report as JSON has it: of one target, or ``{"targets": [...]}``."""

    folder: Path
    report: dict[str, Any]


def prune(
    model_id: str,
    spec: PruningSpec,
    output_dir: Path,
    *,
    revision: str | None = None,
    gguf_file: str | None = None,
    on_event: Callable[[dict[str, Any]], object] = lambda event: None,
    stop: Callable[[], bool] = lambda: False,
    resume: Mapping[str, Any] | None = None,
    provenance: Callable[[int], Mapping[str, Any]] = lambda index: {},
    **workspace: Any,
) -> Pruned:
    """Prune a named model to a folder; ``workspace`` are fields of :class:`Workspace`."""

    def listen(event: Event) -> None:
        data = event.as_dict()
        on_event(data | {"state": event.state} if isinstance(event, StepEvent) else data)

    reports = prune_to_folder(
        NamedModel(model_id, revision, gguf_file),
        spec,
        output_dir,
        Workspace(**workspace),
        Listener(listen, stop),
        resume=resume,
        provenance=provenance,
    )
    found = [report.as_dict() for report in reports]
    return Pruned(output_dir, {"targets": found} if spec.several else found[0])


def resolved(spec: PruningSpec, shape: ModelShape) -> Resolved:
    """The request on a model of this shape, in float32, without the checks of :func:`secateur.catalog.resolve.resolve`."""
    ratios = tuple(ratio for ratio in spec.requested_ratios if ratio is not None)
    chosen = components(spec)
    splits: tuple[Mapping[tuple[int, ...], Mapping[str, int]], ...] = tuple(
        {(): whole_units(shape, {}, chosen.structures, spec.shares, ratio)} for ratio in ratios
    )
    return Resolved(spec, chosen, ratios, True, splits, shape.width_multiple(spec.allocation.width_multiple), "float32")
