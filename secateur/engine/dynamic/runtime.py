"""A dynamic checkpoint at runtime: transformers loads it from its folder, and it is measured like any other model."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from secateur.catalog.architectures import LayerShape
from secateur.catalog.structures import LayerCost
from secateur.engine.model.decoder import Decoder, token_losses

PRIOR_WEIGHTS = (0.0, 0.25, 0.5, 0.75, 1.0)
TRIED_WINDOWS = 8


class Runtime(Decoder):
    """The model of a dynamic checkpoint.

    Its modules are not split into projections, so its layers cannot be pruned. Its widths are those of the units that
    generate.
    """

    def __init__(self, decoder: Decoder, folder: Path, kept: list[list[int]]) -> None:
        """Load the dynamic model from ``folder``.

        ``decoder`` is the same model without dynamic pruning; ``kept`` holds the numbers of KV groups and channels of
        each layer that generate.
        """
        model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype=decoder.model.dtype)
        self.placement = decoder.placement
        self.model = model.to(decoder.device).eval().requires_grad_(False)
        self.tokenizer, self.shape, self.opening = decoder.tokenizer, decoder.shape, decoder.opening
        self.read_share = decoder.read_share
        self.layers = []
        self._widths = [
            LayerShape(groups, groups * width.heads_per_group, width.head_dim, channels)
            for width, (groups, channels) in zip(decoder.shape.layers, kept, strict=True)
        ]

    @property
    def costs(self) -> Sequence[LayerCost]:
        return self.shape.costs

    @property
    def widths(self) -> list[LayerShape]:
        return self._widths

    @torch.no_grad()
    def batch_losses(
        self, tokens: Tensor, batch_windows: int, progress: Callable[[float], None] = lambda share: None
    ) -> Iterator[Tensor]:
        """Yield the next-token losses ``[windows, predicted]`` of each batch of ``tokens`` ``[windows, length]``.

        Tokens that are read first (see ``read_share``) have no loss. Each window has its own choice of units.
        """
        read, done = self.read_tokens(tokens), 0
        for batch in tokens.split(batch_windows):
            yield torch.cat([self._continued(window, read) for window in batch.split(1)])
            done += len(batch)
            progress(done / len(tokens))

    def _continued(self, window: Tensor, read: int) -> Tensor:
        return token_losses(self.logits(window, read)[:, read - 1 :], window[:, read - 1 :])

    @torch.no_grad()
    def logits(self, tokens: Tensor, read: int) -> Tensor:
        """Return the logits ``[batch, length, vocabulary]`` of ``tokens`` ``[batch, length]``.

        The whole model computes the first ``read`` positions; the units that generate compute the rest.
        """
        positions = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)
        prompt = self.model(tokens[:, :read], use_cache=True)
        cache = prompt.past_key_values
        self.model.settle(cache)
        rest = self.model(tokens[:, read:], past_key_values=cache, position_ids=positions[:, read:], use_cache=True)
        return torch.cat([prompt.logits, rest.logits], 1)

    def choose_prior_weight(self, tokens: Tensor) -> float:
        """Set and return the prior weight of :data:`PRIOR_WEIGHTS` that has the lowest loss.

        The loss is measured on the first of the windows ``tokens`` ``[windows, length]``.
        """
        losses = {}
        for weight in PRIOR_WEIGHTS:
            self.model.config.dynamic_pruning["prior_weight"] = weight
            losses[weight] = float(next(self.batch_losses(tokens[:TRIED_WINDOWS], TRIED_WINDOWS)).double().mean())
        best = min(PRIOR_WEIGHTS, key=lambda weight: losses[weight])
        self.model.config.dynamic_pruning["prior_weight"] = best
        return best
