"""The tables of a model that have one row for each token: the input embedding and the output head."""

from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from secateur.engine.structures.vocabulary.kept import Vocabulary, unsupported
from secateur.engine.structures.vocabulary.names import renumber_model


class TableBytes(NamedTuple):
    """Bytes of the embedding and the head, before and after the cut; tied tables count once."""

    before: int
    after: int


@torch.no_grad()
def cut_model(model: PreTrainedModel, vocabulary: Vocabulary) -> TableBytes:
    """Keep the kept tokens' rows of the embedding and the head, and renumber the token ids that the configs name.

    The model is changed in place. Tied tables stay tied. The logits of a kept token do not change.

    Raises:
        PruningError: ``vocabulary_unsupported`` when a table is of an unknown kind, or when a config names tokens that
            cannot be renumbered; the model is then unchanged.
    """
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    _check(model, embedding, head, vocabulary)
    before = _bytes(embedding, head)
    kept = torch.tensor(vocabulary.kept, device=embedding.weight.device)
    tied = head is not None and head.weight is embedding.weight
    renumber_model(model, vocabulary)
    embedding.weight = _rows(embedding.weight, kept)
    embedding.num_embeddings = vocabulary.size
    if embedding.padding_idx is not None:
        embedding.padding_idx = vocabulary.renumber(embedding.padding_idx, "pad_token_id")
    if head is not None:
        head.weight = embedding.weight if tied else _rows(head.weight, kept)
        head.out_features = vocabulary.size
        if head.bias is not None:
            head.bias = _rows(head.bias, kept)
    bias = getattr(model, "final_logits_bias", None)
    if isinstance(bias, Tensor):
        model.final_logits_bias = bias[..., kept.to(bias.device)]
    for module in model.modules():
        if getattr(module, "vocab_size", None) == vocabulary.rows:
            module.vocab_size = vocabulary.size
    return TableBytes(before, _bytes(embedding, head))


def _check(model: PreTrainedModel, embedding: nn.Module, head: nn.Module | None, vocabulary: Vocabulary) -> None:
    if not isinstance(embedding, nn.Embedding):
        raise unsupported(f"its embedding is a {type(embedding).__name__}; allowed: nn.Embedding")
    if embedding.num_embeddings != vocabulary.rows:
        raise unsupported(f"its embedding has {embedding.num_embeddings} rows, and the choice is of {vocabulary.rows}")
    if head is not None and (not isinstance(head, nn.Linear) or head.out_features != vocabulary.rows):
        raise unsupported(f"its head is {head}; allowed: nn.Linear with {vocabulary.rows} outputs")
    for name, module in model.named_modules():
        more = isinstance(module, nn.Embedding) and module is not embedding
        if more and module.num_embeddings == vocabulary.rows and "pos" not in name:
            raise unsupported(f"it has a second table with a row for each token, {name}")


def _rows(tensor: Tensor, kept: Tensor) -> nn.Parameter:
    return nn.Parameter(tensor[kept.to(tensor.device)], requires_grad=tensor.requires_grad)


def _bytes(embedding: nn.Module, head: nn.Module | None) -> int:
    tables = {
        id(tensor): tensor for module in (embedding, head) if module is not None for tensor in module.parameters()
    }
    return sum(tensor.nbytes for tensor in tables.values())
