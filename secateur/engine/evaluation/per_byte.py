"""The loss per byte of text, by which models with different vocabularies can be compared."""

from collections.abc import Sequence

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from secateur.contract.errors import ErrorCode, PruningError
from secateur.engine.model.decoder import token_losses
from secateur.engine.time_limit import encode


@torch.no_grad()
def nats_per_byte(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], length: int
) -> float:
    """Return the loss of all tokens of ``texts`` in nats, divided by the number of their bytes in UTF-8.

    Every token counts once, the first token of a text too: it is predicted from the tokenizer's token of the beginning,
    or else of the end, of a text, as in the rolling log-likelihood of lm-evaluation-harness. A window has ``length``
    tokens; each begins in the middle of the one before, so that its tokens have at least half a window before them.
    The exponential of the result is the perplexity per byte. Where the tokenizer has no token to begin with, the first
    token costs as much as a token drawn at random.

    Raises:
        PruningError: ``evaluation_too_short`` when the texts are empty; ``tokenizer_unusable``.
    """
    total, size = 0.0, 0
    starts = [token for token in (tokenizer.bos_token_id, tokenizer.eos_token_id) if token is not None]
    for text in texts:
        ids = [*starts[:1], *encode(tokenizer, text, add_special_tokens=False)]
        if not starts and ids:
            total += float(torch.tensor(float(model.config.get_text_config().vocab_size)).log())
        tokens, done = torch.tensor(ids, device=model.device), 1
        for begin in range(0, max(len(ids) - 1, 0), max(length // 2, 1)):
            window = tokens[None, begin : begin + length]
            losses = token_losses(model(window, use_cache=False).logits, window)[0]
            total += float(losses[done - begin - 1 :].double().sum())
            done = begin + window.shape[1]
            if done == len(ids):
                break
        size += len(text.encode())
    if not size:
        raise PruningError(ErrorCode.EVALUATION_TOO_SHORT, "The evaluation text is empty.", field="evaluation")
    return total / size
