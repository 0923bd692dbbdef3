"""A dynamic checkpoint as it runs: loaded by transformers from its folder, measured like any other model."""

from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from secateur.catalog.architectures import LayerShape
from secateur.engine.model.decoder import Decoder, token_losses

PRIOR_WEIGHTS = (0.0, 0.25, 0.5, 0.75, 1.0)
TRIED_WINDOWS = 8


class Runtime(Decoder):
    """The model of a dynamic checkpoint. It is not taken apart: its layers cannot be pruned, and their widths are those that write."""

    def __init__(self, decoder: Decoder, folder: Path, kept: list[list[int]]) -> None:
        """``decoder`` is the same model, plain; ``kept`` the KV groups and channels of each layer that write."""
        model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype=decoder.model.dtype)
        self.model = model.to(decoder.device).eval().requires_grad_(False)
        self.tokenizer, self.shape, self.opening = decoder.tokenizer, decoder.shape, decoder.opening
        self.read_share = decoder.read_share
        self.layers = []
        self._widths = [
            LayerShape(groups, groups * width.heads_per_group, width.head_dim, channels)
            for width, (groups, channels) in zip(decoder.shape.layers, kept, strict=True)
        ]

    @property
    def widths(self) -> list[LayerShape]:
        return self._widths

    @torch.no_grad()
    def window_losses(self, tokens: Tensor) -> Tensor:
        """As the base class has it, each window with units of its own."""
        read = self.read_tokens(tokens)
        return torch.cat([self._continued(window, read) for window in tokens.split(1)])

    def _continued(self, window: Tensor, read: int) -> Tensor:
        return token_losses(self.logits(window, read)[:, read - 1 :], window[:, read - 1 :])

    @torch.no_grad()
    def logits(self, tokens: Tensor, read: int) -> Tensor:
        """``[batch, length, vocabulary]``, by all of the model for the first ``read`` tokens, and by what writes for the rest."""
        positions = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)
        prompt = self.model(tokens[:, :read], use_cache=True)
        cache = prompt.past_key_values
        self.model.settle(cache)
        rest = self.model(tokens[:, read:], past_key_values=cache, position_ids=positions[:, read:], use_cache=True)
        return torch.cat([prompt.logits, rest.logits], 1)

    def choose_prior_weight(self, tokens: Tensor) -> float:
        """Of :data:`PRIOR_WEIGHTS` the one that loses least on the first of ``tokens`` ``[windows, length]``; it is set, too."""
        losses = {}
        for weight in PRIOR_WEIGHTS:
            self.model.config.dynamic_pruning["prior_weight"] = weight
            losses[weight] = float(self.window_losses(tokens[:TRIED_WINDOWS]).double().mean())
        best = min(PRIOR_WEIGHTS, key=lambda weight: losses[weight])
        self.model.config.dynamic_pruning["prior_weight"] = best
        return best
