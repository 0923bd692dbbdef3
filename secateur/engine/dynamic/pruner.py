"""Dynamic pruning: one checkpoint for each ratio.

All checkpoints have the same weights, and every target is one round.
"""

import json
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from secateur.catalog.sources import ModelSource
from secateur.catalog.spec import Format, Layout
from secateur.contract.events import StepEvent
from secateur.contract.report import Published, ReachedRatio, Step, StepKind
from secateur.contract.stages import Stage
from secateur.engine.dynamic.calibrate import kept_units, priors
from secateur.engine.dynamic.check import check_dynamic
from secateur.engine.dynamic.modeling import MODELING_FILE, PRIORS, modeling_file
from secateur.engine.dynamic.runtime import Runtime
from secateur.engine.evaluation import weight_bytes
from secateur.engine.export import check_room, write_model
from secateur.engine.model.decoder import Decoder
from secateur.engine.model.plan import Plan, widths_of
from secateur.engine.run.pruner import Inputs, Pruned
from secateur.engine.run.state import RunState, TargetState
from secateur.engine.run.workspace import Paused
from secateur.engine.scoring.base import Context
from secateur.files import link_or_copy


class DynamicPruned:
    """A dynamic checkpoint that was loaded from its files.

    It implements :class:`secateur.engine.run.pruner.Pruned`.
    """

    def __init__(self, runtime: Runtime, files: Path, plan: Plan, target: TargetState) -> None:
        self.decoder: Decoder = runtime
        self.plan, self.target = plan, target
        self._runtime, self._files = runtime, files

    def write(self, folder: Path, layout: Layout, formats: Sequence[Format]) -> Published:
        check_room(self._runtime, folder, formats)
        shutil.copytree(self._files, folder, copy_function=link_or_copy, dirs_exist_ok=True)
        return Published(parameters=self._runtime.parameters, weights_bytes=weight_bytes(self._runtime))

    def check(self, folder: Path, layout: Layout) -> None:
        check_dynamic(self._runtime, folder)


class DynamicPruner:
    """Makes a dynamic checkpoint for each ratio.

    It implements :class:`secateur.engine.run.pruner.Pruner`.
    """

    def __init__(self, inputs: Inputs, source: ModelSource, files: Path, state: RunState) -> None:
        """Keep the inputs; ``files`` is a folder into which checkpoints are written to be measured."""
        self.state = state
        self._inputs, self._source, self._files = inputs, source, files

    def prune(self, index: int) -> Pruned:
        """Write the checkpoint of target ``index``, load it from its files, and measure it.

        A resumed run writes the same files again, and measures only a target that is not measured yet.
        """
        inputs, began = self._inputs, time.monotonic()
        if inputs.listener.should_stop():
            raise Paused(self.state.as_dict())
        decoder, ratio = inputs.unpruned.peek(), inputs.resolved.ratios[index]
        settings = {"enabled": True, **inputs.resolved.spec.dynamic.model_dump()}
        measured = self.state.targets[index] if index < len(self.state.targets) else None
        if measured is None:
            inputs.progress.stage(Stage.SCORING, index + 1, inputs.tokens.numel())
        kept, known = self._calibrate(decoder, ratio, silent=measured is not None)
        settings["kept"] = kept
        folder = self._files / f"target-{index}"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        check_room(decoder, folder, ["safetensors"])
        write_dynamic(decoder, self._source, folder, known, settings)
        runtime = Runtime(decoder, folder, kept)
        if settings["prior_weight"] is None:
            settings["prior_weight"] = (
                runtime.choose_prior_weight(inputs.tokens) if measured is None else measured.steps[0].prior_weight
            )
            runtime.model.config.dynamic_pruning["prior_weight"] = settings["prior_weight"]
            _configure(decoder, folder, settings)
        plan = Plan.full(decoder.shape.layers)
        if measured is None:
            found = inputs.measurer.measure(runtime)
            step = Step(
                number=index + 1,
                kind=StepKind.ROUND,
                target_ratio=ratio,
                ratio=ReachedRatio(target=ratio, reached=runtime.reached_ratio),
                widths=widths_of(runtime.widths),
                prior_weight=settings["prior_weight"],
                **found.model_dump(exclude_unset=True),
                seconds=time.monotonic() - began,
            )
            measured = TargetState(ratio=ratio, plan=plan.as_data(), steps=(step,))
            self.state = self.state.model_copy(update={"targets": (*self.state.targets, measured), "step": step.number})
            inputs.listener.on_event(StepEvent(step, self.state.as_dict()))
        return DynamicPruned(runtime, folder, plan, measured)

    def _calibrate(self, decoder: Decoder, ratio: float, *, silent: bool) -> tuple[list[list[int]], dict[str, Tensor]]:
        """Return how many units of each layer generate, and the checkpoint's tensors from the calibration text."""
        inputs = self._inputs

        def share(done: float) -> None:
            if not silent:
                inputs.progress.share(done)

        seed = inputs.resolved.spec.seed
        context = Context(
            decoder,
            inputs.tokens,
            inputs.batch_windows,
            inputs.resolved,
            ratio,
            seed + 1,
            lambda done: share(done / 2),
        )
        kept = kept_units(context)
        known = priors(decoder, inputs.tokens, inputs.batch_windows, seed, lambda done: share((1 + done) / 2))
        return kept, known


def write_dynamic(
    decoder: Decoder, source: ModelSource, folder: Path, known: dict[str, Tensor], settings: dict[str, Any]
) -> None:
    """Write the files of a dynamic checkpoint into ``folder``.

    The files are those of the whole model, the modeling file, the tensors ``known`` from calibration, and the config
    with ``settings``.
    """
    write_model(decoder, source, folder, stock=True)
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
