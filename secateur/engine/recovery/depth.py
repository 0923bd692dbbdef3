"""Compensate for removed blocks and sub-layers without training: what they did is folded into weights that stay.

Two parts are folded. The magnitude: later blocks expect hidden states that are longer by a factor a, so everything that
later blocks add is divided by a, which norms undo (Prune&Comp, arXiv 2507.18212, scales the weights before instead,
which tied embeddings do not allow). The direction: the last projection before the gap is fitted to the hidden states
after the gap by damped least squares (ReplaceMe, arXiv 2505.02819). ReplaceMe fits a map of the projection's outputs;
a map of its inputs has more freedom, and measures better. In a mixture, the outputs are mapped, as in ReplaceMe: the
same map then goes into every expert.
"""

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from secateur.contract.errors import ErrorCode, PruningError
from secateur.engine.measure.linalg import damped
from secateur.engine.model.decoder import Captured, Decoder, Entered, Layer
from secateur.engine.structures import sublayers

DAMPING = 3.0
"""Damping of the fit. Of 0.1, 1 and 3, the strongest measured best on texts that the fit does not see."""

Removed = Mapping[str, Collection[int]]
"""The numbers of the blocks that lose each structure: ``layers``, ``attention`` or ``feed_forward``."""


def check_compensable(decoder: Decoder) -> None:
    """Check that what a block adds to the hidden states is linear in its last projection.

    Raises:
        PruningError: ``recovery_unsupported`` when a norm stands between the projection and the hidden states.
    """
    if not decoder.shape.family.additive:
        raise PruningError(
            ErrorCode.RECOVERY_UNSUPPORTED,
            f"Removed layers of {decoder.shape.family.name} models cannot be compensated for: the output of a layer is "
            "normed before it is added to the hidden states, or the hidden states are scaled. Request no compensation.",
            field="recovery",
        )


@torch.no_grad()
def compensate(
    decoder: Decoder, tokens: Tensor, batch_windows: int, removed: Removed, progress: Callable[[float], None]
) -> None:
    """Change the weights that stay so that the model without ``removed`` comes near to the model as it is.

    Blocks and sub-layers are cut afterwards. ``tokens`` is ``[windows, length]``. A run of removed blocks at the start
    has no projection before it, so only its magnitude is compensated for.

    Raises:
        PruningError: ``recovery_unsupported`` (see :func:`check_compensable`), ``loss_not_finite``.
    """
    check_compensable(decoder)
    entered = [decoder.enter(batch) for batch in tokens.split(batch_windows)]
    source = [each.hidden for each in entered]
    hidden, scale, index = list(source), 1.0, 0
    while index < len(decoder.layers):
        after = index + 1
        while after in removed.get("layers", ()):
            after += 1
        for each in range(index, after):
            source = [decoder.run_layer(e, each, h) for e, h in zip(entered, source, strict=True)]
        if index in removed.get("layers", ()):  # the first block, before which nothing can be fitted
            scale *= _magnitude(source, hidden)
        else:
            layer = decoder.layers[index]
            if scale != 1.0:
                _divide(layer, scale)
            with absent(layer, index, removed):
                if after == index + 1 and not _loses(removed, index):
                    hidden = [decoder.run_layer(e, index, h) for e, h in zip(entered, hidden, strict=True)]
                else:
                    last = LastProjection(decoder, index, entered[0], hidden[0])
                    runs = [last.run(e, h) for e, h in zip(entered, hidden, strict=True)]
                    scale *= _magnitude(source, [run.output * scale for run in runs])
                    moments = last.moments()
                    for run, target in zip(runs, source, strict=True):
                        moments.add(run.features, target / scale, target / scale - run.output)
                    change = moments.fit(DAMPING)
                    hidden = [
                        run.output + (run.features @ change.to(run.features.dtype)).view_as(run.output) for run in runs
                    ]
                    last.fold(change)
        index = after
        progress(index / len(decoder.layers))


def _loses(removed: Removed, index: int) -> bool:
    return any(index in removed.get(sublayer, ()) for sublayer in sublayers.UNITS)


@contextmanager
def absent(layer: Layer, index: int, removed: Removed) -> Iterator[None]:
    """Let the removed sub-layers of block ``index`` add nothing while the context lasts."""
    with ExitStack() as stack:
        for sublayer in sublayers.UNITS:
            if index in removed.get(sublayer, ()):
                stack.enter_context(sublayers.without(layer, sublayer))
        yield


def _magnitude(targets: list[Tensor], hidden: list[Tensor]) -> float:
    """Return the mean over tokens of how many times longer the targets are than the hidden states."""
    ratios = [
        (target.float().norm(dim=-1) / own.float().norm(dim=-1).clamp_min(1e-12)).flatten()
        for target, own in zip(targets, hidden, strict=True)
    ]
    return float(torch.cat(ratios).mean())


def _divide(layer: Layer, scale: float) -> None:
    """Divide everything that a block adds to the hidden states by ``scale``."""
    for projection in (layer.attention_output, layer.channel_output):
        for parameter in projection.parameters():
            parameter.div_(scale)


@dataclass(frozen=True)
class Run:
    """A block's output ``[windows, length, hidden]``, and the features ``[tokens, features]`` that the fit maps."""

    output: Tensor
    features: Tensor


class LastProjection:
    """The last projection that adds to a block's output: of feed-forward, or of attention where that is all there is.

    The features are the projection's inputs; in a mixture of experts they are its outputs.
    """

    def __init__(self, decoder: Decoder, index: int, entered: Entered | Captured, hidden: Tensor) -> None:
        """``hidden`` ``[windows, length, hidden]`` enters block ``index``; from it, the block's multiplier is measured."""
        self._decoder, self.index = decoder, index
        layer = decoder.layers[index]
        feeds = not sublayers.is_absent(layer, "feed_forward")
        self.linear = layer.channel_output if feeds else layer.attention_output
        self._maps_outputs = feeds and layer.mixture is not None
        self._gain = self._measure_gain(entered, hidden)

    def run(self, entered: Entered | Captured, hidden: Tensor) -> Run:
        """Run the block on ``hidden``."""
        with _seen(self.linear) as seen:
            output = self._decoder.run_layer(entered, self.index, hidden)
        return Run(output, seen[1 if self._maps_outputs else 0].flatten(0, -2).to(output.device))

    def moments(self) -> "Moments":
        weight = self.linear.weight
        return Moments(weight.shape[0 if self._maps_outputs else 1], weight.shape[0], self._decoder.device)

    def fold(self, change: Tensor) -> None:
        """Let the block's output grow by ``features @ change``; ``change`` is ``[features, hidden]``."""
        weight, bias = self.linear.weight, self.linear.bias
        change = (change.float().T / self._gain).to(weight.device)
        if self._maps_outputs:
            weight.copy_(weight.float() + change @ weight.float())
            if bias is not None:
                bias.copy_(bias.float() + change @ bias.float())
        else:
            weight.copy_(weight.float() + change)

    def _measure_gain(self, entered: Entered | Captured, hidden: Tensor) -> float:
        """Return the factor by which the block multiplies the projection's output, which is 1 in most models."""
        with _seen(self.linear) as seen:
            output = self._decoder.run_layer(entered, self.index, hidden)
        hook = self.linear.register_forward_hook(lambda _, args, given: torch.zeros_like(given))
        try:
            without = self._decoder.run_layer(entered, self.index, hidden)
        finally:
            hook.remove()
        given = seen[1].to(output.device).float().flatten()
        added = (output.float() - without.float()).flatten()
        return float(added @ given / (given @ given).clamp_min(1e-12)) or 1.0


class Moments:
    """Sums over tokens of w·f·fᵀ and w·f·eᵀ of features f and missing hidden states e, in float32.

    The weight w is the inverse mean square of the hidden states that the token should have, by which the next norm
    divides.
    """

    def __init__(self, features: int, hidden_size: int, device: torch.device) -> None:
        self._gram = torch.zeros(features, features, device=device)
        self._missing = torch.zeros(features, hidden_size, device=device)

    def add(self, features: Tensor, target: Tensor, missing: Tensor) -> None:
        """Add tokens: ``features`` ``[tokens, features]``, the ``target`` and what is ``missing``, ``[..., hidden]``."""
        weighted = features.float() / target.flatten(0, -2).float().square().mean(1, keepdim=True).clamp_min(1e-12)
        self._gram += weighted.T @ features.float()
        self._missing += weighted.T @ missing.flatten(0, -2).float()

    def fit(self, damping: float) -> Tensor:
        """Return the map ``[features, hidden]`` from features to missing hidden states, pulled towards zero.

        Raises:
            PruningError: ``loss_not_finite``.
        """
        factor, _ = damped(self._gram, damping)
        return torch.cholesky_solve(self._missing, factor)


@contextmanager
def _seen(linear: nn.Linear) -> Iterator[list[Tensor]]:
    """Record the inputs and the outputs of a projection while the context lasts."""
    seen: list[Tensor] = []
    hook = linear.register_forward_hook(lambda _, args, output: seen.extend((args[0], output)))
    try:
        yield seen
    finally:
        hook.remove()
