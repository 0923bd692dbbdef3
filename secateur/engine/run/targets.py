"""The targets of a pruning, one after the other: rounds, then training where that was asked for, each step resumable."""

import gc
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from secateur.catalog.spec import PruningSpec
from secateur.engine.allocation.schedule import round_targets
from secateur.engine.measure.cache import Statistics
from secateur.engine.model.cutting import apply_plan
from secateur.engine.model.decoder import Decoder
from secateur.engine.model.plan import Plan
from secateur.engine.recovery import LAYERWISE_RECOVERIES, Segment, train
from secateur.engine.run import tensor_files
from secateur.engine.run.progress import Progress
from secateur.engine.run.rounds import prune_round
from secateur.engine.scoring import Context


class Paused(Exception):
    """``stop()`` said so between two steps; the last ``round`` event holds what resuming needs."""


class Targets:
    """Prunes one model to several ratios. ``state`` is JSON-able and changes only when a step is complete.

    Of each target ``state["targets"]`` has ``ratio``, ``plan``, ``rounds`` (their data; ``seconds`` are with measuring),
    ``tensors`` (a reference to the weights that a recovery changed, see :mod:`secateur.engine.run.tensor_files`) and, in
    mid-training, ``training``.
    """

    def __init__(
        self,
        *,
        spec: PruningSpec,
        ratios: tuple[float, ...],
        decoder: Decoder,
        load: Callable[[], Decoder],
        tokens: Tensor,
        batch_windows: int,
        measure: Callable[..., dict[str, Any]],
        statistics: Statistics,
        scratch: Path,
        progress: Progress,
        on_event: Callable[[dict[str, Any]], None],
        stop: Callable[[], bool],
        state: dict[str, Any],
    ) -> None:
        """``decoder`` is the unpruned model, which ``load`` can load again; ``measure(decoder, whole)`` measures."""
        self.state = state
        self._spec, self._ratios = spec, ratios
        self._decoder: Decoder | None = decoder
        """The unpruned model, until the first target takes it."""
        self._reference: Decoder | None = None
        """The unpruned model beside the one being cut, from a target's second round on, or trained."""
        self._load, self._tokens, self._batch_windows, self._measure = load, tokens, batch_windows, measure
        self._statistics, self._scratch = statistics, scratch
        self._progress, self._on_event, self._stop = progress, on_event, stop

    def make(self, index: int, _: Path) -> Decoder:
        """Bring target ``index`` from where its state has it to its end; returns the model. Writes nothing into its folder.

        Let it go before the next target is pruned, or two models are in memory.

        Raises:
            Paused: see there.
            PruningError: see :func:`secateur.engine.run.pipeline.prune`.
        """
        if index == len(self.state["targets"]):
            fresh: dict[str, Any] = {
                "ratio": self._ratios[index],
                "plan": None,
                "rounds": [],
                "tensors": None,
                "training": None,
            }
            self.state = {**self.state, "targets": [*self.state["targets"], fresh]}
        done = len(self.state["targets"][index]["rounds"])
        decoder = self._pruned(index)
        for number in range(done + 1, self._spec.round_count + 1):
            self._pause_if_asked()
            self._prune_round(decoder, index, number)
        if self._spec.training and done < self._spec.rounds_per_target:
            self._pause_if_asked()
            self._train(decoder, index)
        return decoder

    def _pruned(self, index: int) -> Decoder:
        """The model as the state of target ``index`` has it."""
        target = self.state["targets"][index]
        gc.collect()  # what is left of the last target's model
        if self._decoder is None:
            self._progress.stage("loading")
        decoder, self._decoder = self._decoder or self._load(), None
        if target["plan"] is not None:
            apply_plan(decoder, Plan.from_dict(target["plan"]))
        if target["tensors"] is not None:
            put(decoder, tensor_files.read(self._scratch, target["tensors"]))
        return decoder

    def _prune_round(self, decoder: Decoder, index: int, number: int) -> None:
        began = time.monotonic()
        spec, target = self._spec, self.state["targets"][index]
        multiple = decoder.shape.width_multiple(spec.allocation.width_multiple)
        schedule = spec.allocation.schedule
        goals = round_targets(decoder.shape, target["ratio"], spec.round_count, schedule, multiple, spec.uniform)
        self._progress.stage("scoring", self._round(index, number), self._tokens.numel())
        if spec.needs_reference and number > 1:
            self._reference = self._reference or self._load()
        context = Context(
            decoder,
            self._tokens,
            self._batch_windows,
            spec,
            target["ratio"],
            spec.seed + number,
            self._progress.share,
            reference=None if not spec.needs_reference else decoder if number == 1 else self._reference,
            statistics=self._statistics if number == 1 else None,
        )
        plan = Plan.full(decoder.shape.layers) if target["plan"] is None else Plan.from_dict(target["plan"])
        plan = plan.then(prune_round(context, goals[number - 1], multiple))
        if number == spec.round_count:
            self._reference = context.reference = None  # or it would be measured as the pruned model's memory
        data = {
            "target_ratio": target["ratio"],
            "ratio": {"target": goals[number - 1].ratio, "reached": decoder.reached_ratio},
            "widths": plan.widths(decoder.shape),
            **context.details,
            **self._measure(decoder, whole=number == spec.rounds_per_target),
            "seconds": time.monotonic() - began,
        }
        changed = self._keep(index, recovered_tensors(decoder)) if spec.mend in LAYERWISE_RECOVERIES else None
        self._finish(index, data, plan=plan.as_dict(), tensors=changed)

    def _train(self, decoder: Decoder, index: int) -> None:
        """Train from the state's last stretch on; stretches but the last are checkpoints, the last is a round."""
        spec, target = self._spec, self.state["targets"][index]
        kind = spec.training
        assert kind is not None
        began, begun = time.monotonic(), target["training"]
        if kind == "distill":
            self._reference = self._load()
        resume = None
        if begun is not None:
            began -= begun["seconds"]
            resume = Segment(
                begun["step"], begun["steps"], begun["loss"], tensor_files.read(self._scratch, begun["tensors"])
            )
        tokens = round(spec.recovery.epochs * self._tokens.numel())
        self._progress.stage("training", self._round(index, spec.round_count + 1), tokens)
        segments = train(
            decoder,
            self._teach if kind == "distill" else None,
            self._tokens,
            self._batch_windows,
            spec.recovery,
            kind,
            spec.seed,
            self._progress.share,
            resume,
        )
        curve: dict[str, Any] = {}
        for segment in segments:
            curve = {"step": segment.step, "steps": segment.steps, "loss": segment.losses}
            if segment.step < segment.steps:
                tensors = self._keep(index, segment.tensors)
                training = {**curve, "seconds": time.monotonic() - began, "tensors": tensors}
                data = {"target_ratio": target["ratio"], "recovery": {"kind": kind, **curve}}
                self._record(index, data, training=training)
                self._pause_if_asked()
        self._reference = None  # or it would be measured as the pruned model's memory
        widths = Plan.from_dict(target["plan"]).widths(decoder.shape)
        data = {
            "target_ratio": target["ratio"],
            "ratio": {"target": target["ratio"], "reached": decoder.reached_ratio},
            "widths": widths,
            "recovery": {"kind": kind, **curve},
            **self._measure(decoder),
            "seconds": time.monotonic() - began,
        }
        layers = decoder.model.get_submodule(decoder.shape.family.layers)
        trained = dict(layers.named_parameters(prefix=decoder.shape.family.layers))
        self._finish(index, data, training=None, tensors=self._keep(index, trained))

    def _teach(self, windows: Tensor) -> Tensor:
        """The unpruned model's logits ``[windows, length, vocabulary]``."""
        assert self._reference is not None
        logits: Tensor = self._reference.model(windows, use_cache=False).logits
        return logits

    def _round(self, index: int, number: int) -> int:
        """Round ``number`` of target ``index``, counted over all targets."""
        return index * self._spec.rounds_per_target + number

    def _pause_if_asked(self) -> None:
        if self._stop():
            raise Paused

    def _keep(self, index: int, tensors: dict[str, Tensor]) -> dict[str, Any]:
        return tensor_files.write(self._scratch, f"target-{index}", tensors)

    def _finish(self, index: int, data: dict[str, Any], **changes: Any) -> None:
        """A round of target ``index`` is over."""
        rounds = self.state["targets"][index]["rounds"]
        data = {"number": self._number(), **data}
        self._record(index, data, rounds=[*rounds, data], **changes)

    def _record(self, index: int, data: dict[str, Any], **changes: Any) -> None:
        """Move the state of target ``index`` on, and tell."""
        before, targets = self.state, list(self.state["targets"])
        targets[index] = {**targets[index], **changes}
        number = self._number()
        self.state = {**before, "targets": targets, "steps": number}
        self._on_event({"type": "round", "number": number, "data": {"number": number, **data}, "state": self.state})
        tensor_files.delete_all_but(self._scratch, [*_references(self.state), *_references(before)])

    def _number(self) -> int:
        """Of the step that is next; 0 was the unpruned model."""
        return int(self.state.get("steps", 0)) + 1


def _references(state: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """To all tensors that a state needs."""
    for target in state["targets"]:
        for holder in (target, target["training"]):
            if holder is not None and holder["tensors"] is not None:
                yield holder["tensors"]


def recovered_tensors(decoder: Decoder) -> dict[str, Tensor]:
    """The output projections of all layers: a layer-wise recovery rewrites no others."""
    names = {decoder.shape.family.attention_output, decoder.shape.family.channel_output}
    return {
        f"{decoder.shape.family.layers}.{index}.{name}.{kind}": tensor
        for index, layer in enumerate(decoder.layers)
        for name in names
        for kind, tensor in layer[name].state_dict().items()
    }


def put(decoder: Decoder, tensors: dict[str, Tensor]) -> None:
    """Give the model's parameters these values, by name; a bias is made where there was none."""
    for name, tensor in tensors.items():
        owner, _, kind = name.rpartition(".")
        module = decoder.model.get_submodule(owner)
        value = nn.Parameter(tensor.to(decoder.device), requires_grad=False)
        module.register_parameter(kind, value)
