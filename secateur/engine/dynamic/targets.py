"""Makes the dynamic checkpoints of a job: one for each ratio, of weights that all share."""

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from secateur.catalog.sources import ModelSource
from secateur.catalog.spec import PruningSpec
from secateur.engine.dynamic.calibrate import kept_units, priors
from secateur.engine.dynamic.modeling import MODELING_FILE, PRIORS, modeling_file
from secateur.engine.dynamic.runtime import Runtime
from secateur.engine.export import check_room, write_model
from secateur.engine.model.decoder import Decoder
from secateur.engine.model.plan import Plan
from secateur.engine.run.progress import Progress
from secateur.engine.run.targets import Paused
from secateur.engine.scoring.base import Context


class DynamicTargets:
    """``state`` is as :class:`secateur.engine.run.targets.Targets` has it; every target is one round."""

    def __init__(
        self,
        *,
        spec: PruningSpec,
        ratios: tuple[float, ...],
        decoder: Decoder,
        source: ModelSource,
        tokens: Tensor,
        batch_windows: int,
        measure: Callable[[Decoder], dict[str, Any]],
        progress: Progress,
        on_event: Callable[[dict[str, Any]], None],
        stop: Callable[[], bool],
        state: dict[str, Any],
    ) -> None:
        self.state = state
        self._spec, self._ratios, self._decoder, self._source = spec, ratios, decoder, source
        self._tokens, self._batch_windows, self._measure = tokens, batch_windows, measure
        self._progress, self._on_event, self._stop = progress, on_event, stop

    def make(self, index: int, folder: Path) -> Runtime:
        """Write the model's files of target ``index`` into ``folder`` and measure how it runs from there.

        A resumed job writes them anew, which gives the same, and measures what it has not.

        Raises:
            Paused: see there.
            PruningError: see :func:`secateur.engine.run.pipeline.prune`.
        """
        if self._stop():
            raise Paused
        began, spec, decoder = time.monotonic(), self._spec, self._decoder
        measured = index < len(self.state["targets"])
        if not measured:
            self._progress.stage("scoring", index + 1, self._tokens.numel())
        context = Context(
            decoder,
            self._tokens,
            self._batch_windows,
            spec,
            self._ratios[index],
            spec.seed + 1,
            lambda share: self._share(share / 2, measured),
        )
        kept = kept_units(context)
        known = priors(
            decoder, self._tokens, self._batch_windows, spec.seed, lambda share: self._share((1 + share) / 2, measured)
        )
        asked = spec.dynamic
        settings = {"enabled": True, "kept": kept, **asked.model_dump()}
        check_room(decoder, folder, spec.formats)
        write_dynamic(decoder, self._source, folder, known, settings)
        runtime = Runtime(decoder, folder, kept)
        if asked.prior_weight is None:
            settings["prior_weight"] = (
                self.state["targets"][index]["rounds"][0]["prior_weight"]
                if measured
                else runtime.choose_prior_weight(self._tokens)
            )
            runtime.model.config.dynamic_pruning["prior_weight"] = settings["prior_weight"]
            _configure(decoder, folder, settings)
        if not measured:
            data = {
                "number": index + 1,
                "target_ratio": self._ratios[index],
                "ratio": {"target": self._ratios[index], "reached": runtime.reached_ratio},
                "widths": [
                    {"layer": at, "kv_groups": w.kv_groups, "heads": w.heads, "channels": w.channels_per_expert}
                    for at, w in enumerate(runtime.widths)
                ],
                "prior_weight": settings["prior_weight"],
                **self._measure(runtime),
                "seconds": time.monotonic() - began,
            }
            plan = Plan.full(decoder.shape.layers).as_dict()
            done = {"ratio": self._ratios[index], "plan": plan, "rounds": [data]}
            self.state = {**self.state, "targets": [*self.state["targets"], done], "steps": index + 1}
            self._on_event({"type": "round", "number": index + 1, "data": data, "state": self.state})
        return runtime

    def _share(self, share: float, measured: bool) -> None:
        if not measured:
            self._progress.share(share)


def write_dynamic(
    decoder: Decoder, source: ModelSource, folder: Path, known: dict[str, Tensor], settings: dict[str, Any]
) -> None:
    """Write the whole model's files, the modeling file, what is ``known`` from calibration, and the config with ``settings``."""
    write_model(decoder, source, Plan.full(decoder.shape.layers), folder, stock=True)
    save_file(known, folder / PRIORS)
    (folder / MODELING_FILE).write_text(modeling_file(decoder))
    _configure(decoder, folder, settings)


def _configure(decoder: Decoder, folder: Path, settings: dict[str, Any]) -> None:
    path = folder / "config.json"
    config = json.loads(path.read_text())
    causal = type(decoder.model).__name__
    config["auto_map"] = {"AutoModelForCausalLM": f"{Path(MODELING_FILE).stem}.Dynamic{causal}"}
    config["dynamic_pruning"] = settings
    path.write_text(json.dumps(config, indent=2) + "\n")
