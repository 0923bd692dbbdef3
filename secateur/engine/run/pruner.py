"""The protocols that static and dynamic pruning share: a pruner and a pruned model."""

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
from secateur.engine.structures.vocabulary import Vocabulary, cut_decoder


class UnprunedModel:
    """The unpruned model of a run.

    The first call of :meth:`take` returns the loaded model, which the caller may change; later calls load the model
    again.
    """

    def __init__(self, decoder: Decoder, load: Callable[[], Decoder]) -> None:
        """Keep ``decoder``; ``load`` loads the same model once more."""
        self.load = load
        self._first: Decoder | None = decoder

    @property
    def taken(self) -> bool:
        """Whether the next call of :meth:`take` has to load the model."""
        return self._first is None

    def peek(self) -> Decoder:
        """Return the model for reading only; :meth:`take` must not have been called yet."""
        assert self._first is not None
        return self._first

    def take(self) -> Decoder:
        """Return the model, which the caller may change; this object keeps no reference to the model."""
        decoder, self._first = self._first or self.load(), None
        return decoder

    def cut(self, vocabulary: Vocabulary) -> None:
        """Keep only the tokens of ``vocabulary``, in the loaded model and whenever it is loaded again.

        Raises:
            PruningError: ``vocabulary_unsupported``, ``tokenizer_unusable``.
        """
        cut_decoder(self.peek(), vocabulary)
        whole = self.load

        def load() -> Decoder:
            decoder = whole()
            cut_decoder(decoder, vocabulary)
            return decoder

        self.load = load


@dataclass(frozen=True)
class Inputs:
    """The inputs of every pruner."""

    resolved: Resolved
    unpruned: UnprunedModel
    tokens: Tensor
    """Calibration tokens ``[windows, length]`` on the model's device."""
    batch_windows: int
    measurer: Measurer
    progress: Progress
    listener: Listener


class Pruned(Protocol):
    """A pruned model in memory, which can write and check its files."""

    decoder: Decoder
    plan: Plan
    target: TargetState

    def write(self, folder: Path, layout: Layout, formats: Sequence[Format]) -> Published:
        """Write the model's files into ``folder``, without the manifest, and return their size.

        Raises:
            PruningError: ``disk_full``, ``gguf_unsupported``, ``gguf_unavailable``, ``export_invalid``.
        """

    def check(self, folder: Path, layout: Layout) -> None:
        """Load the files of this ``layout`` in fresh processes and compare their results with the model in memory.

        Raises:
            PruningError: ``export_invalid``, ``out_of_memory``.
        """


class Pruner(Protocol):
    """Prunes a model to the ratios of a request, one target after the other."""

    state: RunState
    """The state of the run; it changes when a step is complete, and when competing structures were tried."""

    def prune(self, index: int) -> Pruned:
        """Prune target ``index`` from its recorded state to its end.

        The caller must release the result before the next target is pruned; otherwise two models are in memory.

        Raises:
            Paused: :meth:`Listener.should_stop` returned true between two steps.
            PruningError: the errors of :func:`secateur.engine.run.run.open_run`.
        """
