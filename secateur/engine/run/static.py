"""Static pruning: rounds that cut the model, and then training if it was requested.

A run can be resumed from every step.
"""

import gc
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from secateur.catalog.architectures import ModelShape
from secateur.catalog.gguf import GgufKind
from secateur.catalog.methods import Need
from secateur.catalog.resolve import needs_reference
from secateur.catalog.sources import ModelSource
from secateur.catalog.spec import Format, Layout
from secateur.catalog.structures import WHOLE
from secateur.contract.errors import ErrorCode, PruningError
from secateur.contract.events import StepEvent
from secateur.contract.report import Measurement, Published, ReachedRatio, Step, StepKind, TrainingCurve, Trial
from secateur.contract.stages import Stage
from secateur.engine.allocation.schedule import RoundGoal, round_goals
from secateur.engine.evaluation import weight_bytes
from secateur.engine.export import check_checkpoint, check_room, fits_stock_class, gguf, write_model
from secateur.engine.measure.cache import Statistics
from secateur.engine.measure.texts import batch_windows
from secateur.engine.model.cutting import apply_plan, padded
from secateur.engine.model.decoder import Decoder
from secateur.engine.model.plan import Plan
from secateur.engine.recovery import Segment, train
from secateur.engine.run import tensor_files
from secateur.engine.run.competition import halves, lowest
from secateur.engine.run.pruner import Inputs, Pruned
from secateur.engine.run.rounds import prune_round
from secateur.engine.run.state import RunState, TargetState, TensorReference, TrainingState
from secateur.engine.run.whole import remove_whole
from secateur.engine.run.workspace import Paused
from secateur.engine.scoring import Context
from secateur.engine.structures import WIDTHS
from secateur.engine.structures.layers import as_published, publish


class StaticPruned:
    """A model whose tensors were cut; it implements :class:`Pruned`."""

    def __init__(self, decoder: Decoder, source: ModelSource, target: TargetState, quantization: GgufKind) -> None:
        assert target.plan is not None
        self.decoder, self.target, self.plan = decoder, target, Plan.from_data(target.plan)
        self._source, self._quantization = source, quantization

    def write(self, folder: Path, layout: Layout, formats: Sequence[Format]) -> Published:
        decoder = self.decoder
        with padded(decoder, enabled=layout == "padded"):
            check_room(decoder, folder, formats)
            if "gguf" in formats:
                gguf.write_gguf(decoder, self._source, self._gguf_file(folder), self._quantization)
            write_model(decoder, self._source, folder, layout != "per-layer" or fits_stock_class(decoder))
            return Published(parameters=decoder.parameters, weights_bytes=weight_bytes(decoder))

    def check(self, folder: Path, layout: Layout) -> None:
        with padded(self.decoder, enabled=layout == "padded"):
            check_checkpoint(self.decoder, folder, own_code=any(folder.glob("*.py")))
            if (file := self._gguf_file(folder)).is_file():
                gguf.check_gguf(self.decoder, file, self._quantization)

    def _gguf_file(self, folder: Path) -> Path:
        return folder / f"model-{self._quantization}.gguf"


class StaticPruner:
    """Prunes one model to several ratios; it implements :class:`Pruner`."""

    def __init__(
        self, inputs: Inputs, source: ModelSource, statistics: Statistics, scratch: Path, state: RunState
    ) -> None:
        """Keep the inputs of the run.

        ``statistics`` are those of the unpruned model; ``scratch`` holds the tensors to which the state refers.
        """
        self.state = state
        self._inputs, self._source, self._statistics, self._scratch = inputs, source, statistics, scratch
        self._resolved, self._chosen = inputs.resolved, inputs.resolved.components
        self._reference: Decoder | None = None
        """The unpruned model, in memory beside the model that is pruned: where a round needs it, see
        :func:`secateur.catalog.resolve.needs_reference`, or during training."""

    def prune(self, index: int) -> Pruned:
        if index == len(self.state.targets):
            fresh = TargetState(ratio=self._resolved.ratios[index])
            self.state = self.state.model_copy(update={"targets": (*self.state.targets, fresh)})
        self._compete(index)
        done = len(self.state.targets[index].steps)
        decoder = self._resume(index)
        for number in range(done + 1, self._chosen.rounds + 1):
            self._pause_if_asked()
            self._prune_round(decoder, index, number)
        if self._chosen.training is not None and done < self._chosen.steps_per_target:
            self._pause_if_asked()
            self._train(decoder, index)
        if self.state.targets[index].steps[-1].benchmarks is None:  # it was no last step when it was completed
            self._measure_whole(decoder, index)
        publish(decoder)
        return StaticPruned(decoder, self._source, self.state.targets[index], self._resolved.spec.gguf_quantization)

    def _compete(self, index: int) -> None:
        """Record the trials of target ``index``, the best first, if its structures compete.

        Each trial is a step, from which a later attempt goes on.
        """
        target, splits = self.state.targets[index], self._resolved.splits[index]
        if len(splits) == 1 or target.steps:
            return
        trials = {frozenset(trial.removed.items()): trial for trial in target.trials}
        progress, searching = self._inputs.progress, False

        def loss(removed: Mapping[str, int]) -> float:
            nonlocal searching
            split = frozenset(removed.items())
            if split not in trials:
                self._pause_if_asked()
                if not searching:
                    progress.stage(Stage.SEARCHING)
                    searching = True
                began, before = time.monotonic(), len(trials)
                measured = self._try(
                    target.ratio, removed, lambda share: progress.share((before + share) / len(splits))
                )
                trials[split] = Trial(removed=dict(removed), loss=measured)
                step = Step(
                    number=self.state.step + 1,
                    kind=StepKind.TRIAL,
                    target_ratio=target.ratio,
                    trials=[trials[split]],
                    seconds=time.monotonic() - began,
                )
                self._record(index, step, trials=tuple(trials.values()))
            found = trials[split].loss
            return math.inf if found is None else found

        found = lowest(splits, loss)
        self._reference = None  # the taken split may not need it
        self._change(index, trials=tuple(trials[frozenset(splits[split].items())] for split in found))

    def _try(self, ratio: float, removed: Mapping[str, int], progress: Callable[[float], None]) -> float | None:
        """Return the mean loss of a token in nats after a trial that removes ``removed``, or ``None`` if it is infinite."""
        calibrating, measuring = halves(self._inputs.tokens)
        gc.collect()  # the model of the trial before is in reference cycles
        decoder = self._inputs.unpruned.take()
        context = self._context(decoder, calibrating, ratio, removed, 1)
        context.progress = progress
        try:
            self._cut(context, Plan.full(decoder.shape.layers), removed, self._chosen.rounds)
            measured = mean_loss(decoder, measuring)
        except PruningError as error:
            if error.code != ErrorCode.LOSS_NOT_FINITE:
                raise
            return None
        return measured if math.isfinite(measured) else None

    def _context(
        self, decoder: Decoder, tokens: Tensor, ratio: float, removed: Mapping[str, int], number: int
    ) -> Context:
        """Return the context of round ``number`` on ``tokens``, with ``removed`` whole units gone or still to go."""
        inputs, reference = self._inputs, None
        if self._chosen.fits_to_reference:
            reference = decoder
            if needs_reference(self._chosen, removed) and (number > 1 or removed):
                reference = self._reference = self._reference or inputs.unpruned.load()
        return Context(
            decoder,
            tokens,
            batch_windows(tokens),
            self._resolved,
            ratio,
            self._resolved.spec.seed + number,
            inputs.progress.share,
            reference=reference,
        )

    def _resume(self, index: int) -> Decoder:
        """Return the model in the recorded state of target ``index``."""
        target = self.state.targets[index]
        gc.collect()  # the previous target's model is in reference cycles
        if self._inputs.unpruned.taken:
            self._inputs.progress.stage(Stage.LOADING)
        decoder = self._inputs.unpruned.take()
        if target.plan is not None:
            apply_plan(decoder, Plan.from_data(target.plan))
        if target.tensors is not None:
            put(decoder, tensor_files.read(self._scratch, target.tensors))
        return decoder

    def _prune_round(self, decoder: Decoder, index: int, number: int) -> None:
        if not self.state.targets[index].ratio:
            self._keep_all_units(decoder, index)
            return
        began, first = time.monotonic(), number == 1
        inputs, chosen, target = self._inputs, self._chosen, self.state.targets[index]
        inputs.progress.stage(Stage.SCORING, self._step_number(index, number), inputs.tokens.numel())
        plan = self._full_plan(decoder) if target.plan is None else Plan.from_data(target.plan)
        removed = target.trials[0].removed if target.trials else next(iter(self._resolved.splits[index].values()))
        context = self._context(decoder, inputs.tokens, target.ratio, removed, number)
        context.statistics = self._statistics if first else None
        if first and target.trials:
            context.details["trials"] = target.trials
        plan, goal = self._cut(context, plan, removed if first else {}, number)
        if number == chosen.rounds:
            self._reference = context.reference = None  # otherwise it would count as the pruned model's memory
        measured = self._measure(decoder, whole=number == chosen.steps_per_target)
        step = Step(
            number=self.state.step + 1,
            kind=StepKind.ROUND,
            target_ratio=target.ratio,
            ratio=ReachedRatio(target=goal.ratio, reached=_reached(decoder)),
            widths=plan.widths(decoder.shape),
            **context.details,
            **measured.model_dump(exclude_unset=True),
            seconds=time.monotonic() - began,
        )
        changed = self._keep(index, recovered_tensors(decoder)) if chosen.recovers_layerwise else None
        self._complete(index, step, plan=plan.as_data(), tensors=changed)

    def _cut(self, context: Context, plan: Plan, whole: Mapping[str, int], number: int) -> tuple[Plan, RoundGoal]:
        """Remove the units ``whole`` from the model that ``plan`` left, and then widths to the goal of round ``number``.

        Return the plan over the source, and the goal.
        """
        shape = context.decoder.shape.cutting(self._chosen.structures)
        if whole:
            plan = plan.then(remove_whole(context, whole))
        context.begun = replace(shape, layers=tuple(plan.shapes(shape, WHOLE)))
        goal = self._goal(context.begun, shape, context.target_ratio, number)
        return (plan.then(prune_round(context, goal)) if self._chosen.cuts_widths else plan), goal

    def _goal(self, begun: ModelShape, source: ModelShape, ratio: float, number: int) -> RoundGoal:
        """Return the goal of round ``number``: what is removed from the widths of ``begun``, and the ratio of ``source``."""
        if not self._chosen.cuts_widths:
            return RoundGoal(ratio, {})
        gone = source.prunable_parameters - begun.prunable_parameters - begun.standing_in(source)
        share = (ratio * source.prunable_parameters - gone) / begun.prunable_parameters
        goals = round_goals(
            begun,
            share,
            self._chosen.rounds,
            self._resolved.spec.allocation.schedule,
            self._resolved.width_multiple,
            self._resolved.uniform,
        )
        goal = goals[number - 1]
        reached = (gone + goal.ratio * begun.prunable_parameters) / source.prunable_parameters
        return RoundGoal(reached if gone else goal.ratio, goal.parameters)

    def _measure(self, decoder: Decoder, *, whole: bool = True) -> Measurement:
        """Measure a model as it would be published."""
        with as_published(decoder):
            return self._inputs.measurer.measure(decoder, whole=whole)

    def _keep_all_units(self, decoder: Decoder, index: int) -> None:
        """Complete the one round of a run that removes tokens alone, which are cut when the model is loaded."""
        began, plan = time.monotonic(), self._full_plan(decoder)
        measured = self._measure(decoder, whole=self._chosen.steps_per_target == 1)
        step = Step(
            number=self.state.step + 1,
            kind=StepKind.ROUND,
            target_ratio=0.0,
            ratio=ReachedRatio(target=0.0, reached=decoder.reached_ratio),
            widths=plan.widths(decoder.shape),
            **measured.model_dump(exclude_unset=True),
            seconds=time.monotonic() - began,
        )
        self._complete(index, step, plan=plan.as_data())

    def _full_plan(self, decoder: Decoder) -> Plan:
        """Return the plan that keeps every unit of the layers, and the tokens that the run keeps."""
        cut = decoder.vocabulary
        model = {} if cut is None else {"vocabulary": cut.vocabulary.kept}
        return Plan(Plan.full(decoder.shape.layers).layers, model)

    def _train(self, decoder: Decoder, index: int) -> None:
        """Train the model, from the last recorded segment on.

        Every segment except the last is a step that can be resumed from.
        """
        inputs, spec, target = self._inputs, self._resolved.spec, self.state.targets[index]
        settings, training = spec.recovery.training, self._chosen.training
        assert settings is not None and training is not None and target.plan is not None
        began, begun = time.monotonic(), target.training
        if Need.REFERENCE in training.needs:
            self._reference = inputs.unpruned.load()
        resume = None
        if begun is not None:
            began -= begun.seconds
            resume = Segment(begun.step, begun.steps, list(begun.loss), tensor_files.read(self._scratch, begun.tensors))
        tokens = round(settings.epochs * inputs.tokens.numel())
        inputs.progress.stage(Stage.TRAINING, self._step_number(index, self._chosen.rounds + 1), tokens)
        segments = train(
            decoder,
            self._teach if self._reference is not None else None,
            inputs.tokens,
            inputs.batch_windows,
            settings,
            spec.seed,
            inputs.progress.share,
            resume,
        )
        curve: dict[str, Any] = {}
        for segment in segments:
            curve = {"kind": training.name, "step": segment.step, "steps": segment.steps, "loss": segment.losses}
            if segment.step < segment.steps:
                tensors = self._keep(index, segment.tensors)
                stretch = TrainingState(**curve, seconds=time.monotonic() - began, tensors=tensors)
                step = Step(
                    number=self.state.step + 1,
                    kind=StepKind.TRAINING,
                    target_ratio=target.ratio,
                    training=TrainingCurve(**curve),
                )
                self._record(index, step, training=stretch)
                self._pause_if_asked()
        self._reference = None  # otherwise it would count as the pruned model's memory
        measured = self._measure(decoder)
        step = Step(
            number=self.state.step + 1,
            kind=StepKind.TRAINING,
            target_ratio=target.ratio,
            ratio=ReachedRatio(target=target.ratio, reached=_reached(decoder)),
            widths=Plan.from_data(target.plan).widths(decoder.shape),
            training=TrainingCurve(**curve),
            **measured.model_dump(exclude_unset=True),
            seconds=time.monotonic() - began,
        )
        layers = decoder.model.get_submodule(decoder.shape.family.layers)
        trained = dict(layers.named_parameters(prefix=decoder.shape.family.layers))
        self._complete(index, step, training=None, tensors=self._keep(index, trained))

    def _measure_whole(self, decoder: Decoder, index: int) -> None:
        """Measure the model of the newest step of target ``index`` with the whole suite, and report the step again."""
        *before, last = self.state.targets[index].steps
        measured = self._measure(decoder).model_dump(exclude_unset=True)
        step = Step(**{**last.model_dump(exclude_unset=True), **measured})
        self._record(index, step, steps=(*before, step))

    def _teach(self, windows: Tensor) -> Tensor:
        """Return the unpruned model's logits ``[windows, length, vocabulary]``."""
        assert self._reference is not None
        logits: Tensor = self._reference.model(windows, use_cache=False).logits
        return logits

    def _step_number(self, index: int, number: int) -> int:
        """Return the number of step ``number`` of target ``index``, counted over all targets."""
        return index * self._chosen.steps_per_target + number

    def _pause_if_asked(self) -> None:
        if self._inputs.listener.should_stop():
            raise Paused(self.state.as_dict())

    def _keep(self, index: int, tensors: dict[str, Tensor]) -> TensorReference:
        return tensor_files.write(self._scratch, f"target-{index}", tensors)

    def _complete(self, index: int, step: Step, **changes: Any) -> None:
        """Record the complete step of target ``index``: a round, or the training."""
        self._record(index, step, steps=(*self.state.targets[index].steps, step), **changes)

    def _record(self, index: int, step: Step, **changes: Any) -> None:
        """Replace the state of target ``index``, and report the step."""
        before = self.state
        self._change(index, **changes)
        self.state = self.state.model_copy(update={"step": step.number})
        self._inputs.listener.on_event(StepEvent(step, self.state.as_dict()))
        tensor_files.delete_all_but(self._scratch, [*self.state.references(), *before.references()])

    def _change(self, index: int, **changes: Any) -> None:
        """Replace the state of target ``index``."""
        targets = list(self.state.targets)
        targets[index] = targets[index].model_copy(update=changes)
        self.state = self.state.model_copy(update={"targets": tuple(targets)})


def _reached(decoder: Decoder) -> float:
    """Return the ratio that a model would have reached as it would be published."""
    with as_published(decoder):
        return decoder.reached_ratio


@torch.no_grad()
def mean_loss(decoder: Decoder, tokens: Tensor) -> float:
    """Return the mean next-token loss of ``tokens`` ``[windows, length]`` in nats."""
    with decoder.routed():
        losses = [losses.double().flatten() for losses in decoder.batch_losses(tokens, batch_windows(tokens))]
    return float(torch.cat(losses).mean())


def recovered_tensors(decoder: Decoder) -> dict[str, Tensor]:
    """Return the tensors of the output projections of all layers, by name.

    A layer-wise recovery changes no other tensors.
    """
    return {
        f"{layer.family.layers}.{index}.{structure.output_name(layer.family)}.{kind}": tensor
        for index, layer in enumerate(decoder.layers)
        for structure in WIDTHS.values()
        if structure.units(layer)
        for kind, tensor in structure.output(layer).state_dict().items()
    }


def put(decoder: Decoder, tensors: dict[str, Tensor]) -> None:
    """Set the model's parameters to ``tensors``, by name.

    A bias is created in projections that have none.
    """
    for name, tensor in tensors.items():
        owner, _, kind = name.rpartition(".")
        module = decoder.model.get_submodule(owner)
        held = next(module.parameters()).device
        value = nn.Parameter(tensor.to(held), requires_grad=False)
        module.register_parameter(kind, value)
