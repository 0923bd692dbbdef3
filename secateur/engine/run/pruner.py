"""What static and dynamic pruning have in common: one protocol for whoever prunes a model, one for what comes of it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from torch import Tensor

from secateur.catalog.resolve import Resolved
from secateur.catalog.spec import Format, Layout
from secateur.contract.report import Published
from secateur.engine.model.decoder import Decoder
from secateur.engine.model.plan import Plan
from secateur.engine.run.measuring import Measurer
from secateur.engine.run.progress import Progress
from secateur.engine.run.state import RunState, TargetState
from secateur.engine.run.workspace import Listener


class UnprunedModel:
    """The unpruned model of a run: its first user takes it and may change it, later users get it loaded anew."""

    def __init__(self, decoder: Decoder, load: Callable[[], Decoder]) -> None:
        """``load`` loads the model once more."""
        self.load = load
        self._first: Decoder | None = decoder

    @property
    def taken(self) -> bool:
        """Whether the next :meth:`take` has to load the model."""
        return self._first is None

    def peek(self) -> Decoder:
        """The model, to be read and not changed; it must not be taken yet."""
        assert self._first is not None
        return self._first

    def take(self) -> Decoder:
        """The model, to be changed; this object keeps no reference to it."""
        decoder, self._first = self._first or self.load(), None
        return decoder


@dataclass(frozen=True)
class Inputs:
    """What every pruner is given."""

    resolved: Resolved
    unpruned: UnprunedModel
    tokens: Tensor
    """Calibration tokens ``[windows, length]`` on the model's device."""
    batch_windows: int
    measurer: Measurer
    progress: Progress
    listener: Listener


class Pruned(Protocol):
    """A pruned model in memory, and how its files are written and checked."""

    decoder: Decoder
    plan: Plan
    target: TargetState

    def write(self, folder: Path, layout: Layout, formats: Sequence[Format]) -> Published:
        """Write the model's files into ``folder``, without the manifest; returns their size.

        Raises:
            PruningError: ``disk_full``, ``gguf_unsupported``, ``gguf_unavailable``, ``export_invalid``.
        """

    def check(self, folder: Path, layout: Layout) -> None:
        """Load the files of this ``layout`` in fresh processes, and compare what they compute with the model in memory.

        Raises:
            PruningError: ``export_invalid``, ``out_of_memory``.
        """


class Pruner(Protocol):
    """Prunes a model to the ratios of a request, one target after the other."""

    state: RunState
    """Changes only when a step is complete."""

    def prune(self, index: int) -> Pruned:
        """Bring target ``index`` from where the state has it to its end.

        The caller must drop the result before the next target is pruned, or two models are in memory.

        Raises:
            Paused: :meth:`Listener.should_stop` returned true between two steps.
            PruningError: see :func:`secateur.engine.run.run.open_run`.
        """
