"""Measurement of models during a run.

Perplexity and sizes are measured after every step. The whole suite is measured for the unpruned model and at the end of
each target.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from secateur.contract.events import WarningEvent
from secateur.contract.report import Measurement
from secateur.contract.stages import Stage
from secateur.engine.evaluation import Suite, forward_flops, perplexity, unsteady, weight_bytes
from secateur.engine.evaluation.per_byte import nats_per_byte
from secateur.engine.measure.texts import Windows, batch_windows
from secateur.engine.model.decoder import Decoder
from secateur.engine.run.progress import Progress
from secateur.engine.run.workspace import Listener

FLOPS_TOKENS = 256


@dataclass(frozen=True)
class Measurer:
    """Measures models on one evaluation text and with one suite."""

    evaluation: Windows
    suite: Suite
    progress: Progress
    listener: Listener
    texts: Sequence[str] = ()
    """The evaluation text, for the loss by byte, which is measured with the whole suite if there is a text."""

    def measure(self, decoder: Decoder, *, whole: bool = True) -> Measurement:
        """Measure a model; with ``whole``, measure the suite too.

        Raises:
            PruningError: the errors of :func:`secateur.engine.evaluation.perplexity` and :meth:`Suite.measure`.
        """
        tokens, lengthy = self.evaluation.tokens, whole and self.suite.lengthy
        self.progress.stage(Stage.EVALUATING, tokens=None if lengthy else tokens.numel())
        parts = 2 if lengthy else 1
        with decoder.routed():
            value = perplexity(decoder, tokens, batch_windows(tokens), lambda share: self.progress.share(share / parts))
            found = (
                self.suite.measure(decoder, lambda share: self.progress.share((parts - 1 + share) / parts))
                if whole
                else Measurement(latency=None)
            )
            if whole and self.texts:
                # A text has more tokens than its window had, once the vocabulary is smaller.
                length = min(2 * tokens.shape[1], decoder.shape.max_positions)
                loss = nats_per_byte(decoder.model, decoder.tokenizer, self.texts, length)
                found = found.model_copy(update={"nats_per_byte": loss if math.isfinite(loss) else None})
        if unsteady(found.latency):
            message = "latency: repeats are far apart, so the machine was busy with something else; see their spread."
            self.listener.on_event(WarningEvent(message))
        return found.model_copy(
            update={
                "perplexity": value if math.isfinite(value) else None,  # JSON has no infinity
                "parameters": decoder.parameters,
                "prunable_parameters": decoder.prunable_parameters,
                "weights_bytes": weight_bytes(decoder),
                "flops": forward_flops(decoder, FLOPS_TOKENS),
            }
        )
