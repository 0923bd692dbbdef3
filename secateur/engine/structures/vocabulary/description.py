"""The content of ``tokenizer.json``, the file of the ``tokenizers`` library, and its cut."""

import json
from collections.abc import Mapping
from typing import Any

from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase

from secateur.engine.structures.vocabulary.kept import Vocabulary, unsupported
from secateur.engine.structures.vocabulary.pieces import Pieces

NUMBERLESS = {"ByteLevel"}
"""Post-processors that name no token ids."""


def describe(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """Return the content of the tokenizer's ``tokenizer.json``.

    Raises:
        PruningError: ``vocabulary_unsupported`` when the tokenizer is not one of the ``tokenizers`` library.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if not isinstance(backend, Tokenizer):
        raise unsupported(f"its tokenizer, {type(tokenizer).__name__}, has no tokenizer.json")
    description: dict[str, Any] = json.loads(backend.to_str())
    return description


def cut_description(description: Mapping[str, Any], pieces: Pieces, vocabulary: Vocabulary) -> dict[str, Any]:
    """Return the content of ``tokenizer.json`` with only the kept tokens, under their new ids.

    ``pieces`` are those of ``description``.

    Raises:
        PruningError: ``vocabulary_unsupported`` for a kind of post-processor that cannot be renumbered.
    """
    added = [
        {**token, "id": vocabulary.renumber(token["id"], f"the added token {token['content']!r}")}
        for token in description["added_tokens"]
    ]
    padding = description.get("padding")
    if padding is not None:
        padding = {**padding, "pad_id": vocabulary.renumber(padding["pad_id"], "padding.pad_id of tokenizer.json")}
    return {
        **description,
        "model": pieces.cut(description["model"], vocabulary),
        "added_tokens": added,
        "post_processor": _cut_processor(description.get("post_processor"), vocabulary),
        "padding": padding,
    }


def build(description: Mapping[str, Any]) -> Tokenizer:
    """Return the tokenizer that ``description`` describes."""
    return Tokenizer.from_str(json.dumps(description, ensure_ascii=False))


def _cut_processor(processor: Mapping[str, Any] | None, vocabulary: Vocabulary) -> dict[str, Any] | None:
    if processor is None:
        return None
    kind = processor["type"]
    where = f"the post-processor {kind} of tokenizer.json"
    if kind == "Sequence":
        return {**processor, "processors": [_cut_processor(step, vocabulary) for step in processor["processors"]]}
    if kind == "TemplateProcessing":
        tokens = {
            name: {**token, "ids": [vocabulary.renumber(each, where) for each in token["ids"]]}
            for name, token in processor["special_tokens"].items()
        }
        return {**processor, "special_tokens": tokens}
    if kind in ("RobertaProcessing", "BertProcessing"):
        ends = {end: [processor[end][0], vocabulary.renumber(processor[end][1], where)] for end in ("sep", "cls")}
        return {**processor, **ends}
    if kind in NUMBERLESS:
        return dict(processor)
    raise unsupported(f"{where} may name token ids; allowed: TemplateProcessing, RobertaProcessing, BertProcessing")
