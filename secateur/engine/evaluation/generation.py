"""Generate text with a model, for people who want to read its output and not only a number."""

from collections.abc import Sequence

import torch
from transformers import GenerationConfig

from secateur.engine.measure.texts import plain_generation
from secateur.engine.model.decoder import Decoder
from secateur.engine.time_limit import encode

NEW_TOKENS = 32
PROMPTS = ("The capital of France is", "Once upon a time, in a small village,", "To keep bread fresh for longer,")
"""Prompts for a request that names none."""


@torch.no_grad()
def generations(decoder: Decoder, prompts: Sequence[str]) -> list[str]:
    """Return the model's continuation of each prompt: up to :data:`NEW_TOKENS` tokens, always the most likely one."""
    end = decoder.tokenizer.eos_token_id
    config = GenerationConfig(max_new_tokens=NEW_TOKENS, do_sample=False, eos_token_id=end, pad_token_id=end)
    written = []
    for prompt in prompts:
        tokens = torch.tensor([encode(decoder.tokenizer, prompt)], device=decoder.device)
        tokens = tokens[:, -(decoder.shape.max_positions - NEW_TOKENS) :]
        with plain_generation(decoder.model):
            output = decoder.model.generate(tokens, attention_mask=torch.ones_like(tokens), generation_config=config)
        written.append(decoder.tokenizer.decode(output[0, tokens.shape[1] :], skip_special_tokens=True))
    return written
