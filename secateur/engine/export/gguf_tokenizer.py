"""Conversion of a model's tokenizer to GGUF metadata."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
from gguf import GGUFWriter, TokenType
from sentencepiece import SentencePieceProcessor
from transformers import PreTrainedTokenizerBase

from secateur.catalog.gguf import unsupported
from secateur.catalog.sources import ModelSource
from secateur.engine.time_limit import encode

GPT2, DIGITS = "GPT-2's words", "single digits"
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|"
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|"
    r"\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
PRE_TOKENIZERS: dict[tuple[tuple[str, ...], bool], str] = {
    ((GPT2,), False): "gpt-2",
    ((DIGITS, GPT2), False): "smollm",
    ((LLAMA3,), True): "llama-bpe",
    ((LLAMA3,), False): "dbrx",
    ((LLAMA3.replace("{1,3}", ""),), False): "qwen2",
    ((TEKKEN,), True): "tekken",
}
"""llama.cpp's name of a pre-tokenizer. The key holds the splits of the text before merges, and whether a word of the
vocabulary skips the merges (``llm_tokenizer_bpe`` and ``load`` in ``llama-vocab.cpp``)."""
FILLER_SCORE, ADDED_SCORE = -10000.0, -1000.0


def write_tokenizer(
    writer: GGUFWriter, source: ModelSource, tokenizer: PreTrainedTokenizerBase, vocab_size: int
) -> None:
    """Add the metadata with which llama.cpp converts text to this model's tokens and back.

    The fields of a GGUF source are copied.

    Raises:
        PruningError: ``gguf_unsupported`` when llama.cpp does not know the tokenizer's kind.
    """
    assert source.path is not None
    if source.gguf_file is not None:
        for key, field in gguf.GGUFReader(source.path / source.gguf_file).fields.items():
            if key.startswith("tokenizer."):
                writer.add_key_value(key, field.contents(), field.types[0], field.types[-1])
        return
    pieces = source.path / "tokenizer.model"
    if pieces.is_file():
        tokens, scores, types = _fill(dict(_pieces(pieces, tokenizer)), vocab_size)
        writer.add_tokenizer_model("llama")
        writer.add_tokenizer_pre("default")
        writer.add_token_scores(scores)
        writer.add_add_space_prefix(tokenizer.tokenize("x")[0].startswith("▁"))
    else:
        description = _description(source.path)
        tokens, _, types = _fill(dict(_words(tokenizer)), vocab_size)
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(_pre_tokenizer(description))
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    special = gguf.SpecialVocab(source.path, load_merges=not pieces.is_file(), n_vocab=vocab_size)
    bare, dressed = (encode(tokenizer, "x", add_special_tokens=dress) for dress in (False, True))
    special.add_special_token = {"bos": dressed[0] != bare[0], "eos": dressed[-1] != bare[-1]}
    special.add_to_gguf(writer, quiet=True)


Token = tuple[int, tuple[str, float, TokenType]]
"""The number of a token, with its text, score and kind."""


def _fill(known: dict[int, tuple[str, float, TokenType]], vocab_size: int) -> tuple[list[str], list[float], list[int]]:
    """Return texts, scores and kinds of all rows of the embedding.

    The embedding may have more or fewer rows than the tokenizer has tokens.
    """
    rows = [known.get(index, (f"[PAD{index}]", FILLER_SCORE, TokenType.UNUSED)) for index in range(vocab_size)]
    texts, scores, kinds = zip(*rows, strict=True)
    return list(texts), list(scores), list(kinds)


def _added(tokenizer: PreTrainedTokenizerBase) -> dict[int, tuple[str, TokenType]]:
    """Return the tokens that are searched for in a text first; as llama.cpp expects, they have plain spaces."""
    return {
        index: (token.content.replace("▁", " "), TokenType.CONTROL if token.special else TokenType.USER_DEFINED)
        for index, token in tokenizer.added_tokens_decoder.items()
    }


def _words(tokenizer: PreTrainedTokenizerBase) -> Iterator[Token]:
    added = _added(tokenizer)
    for text, index in tokenizer.get_vocab().items():
        content, kind = added.get(index, (text, TokenType.NORMAL))
        yield index, (content, 0.0, kind)


def _pieces(path: Path, tokenizer: PreTrainedTokenizerBase) -> Iterator[Token]:
    processor = SentencePieceProcessor(model_file=str(path))
    kinds = {
        TokenType.UNKNOWN: processor.IsUnknown,
        TokenType.CONTROL: processor.IsControl,
        TokenType.UNUSED: processor.IsUnused,
        TokenType.BYTE: processor.IsByte,
    }
    for index in range(processor.vocab_size()):
        kind = next((kind for kind, test in kinds.items() if test(index)), TokenType.NORMAL)
        yield index, (processor.IdToPiece(index), processor.GetScore(index), kind)
    for index, (content, kind) in _added(tokenizer).items():
        if index >= processor.vocab_size() or not processor.IsUnknown(index):
            yield index, (content, ADDED_SCORE, kind)


def _description(folder: Path) -> dict[str, Any]:
    path = folder / "tokenizer.json"
    description: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    if description.get("model", {}).get("type") != "BPE" or not description.get("pre_tokenizer"):
        raise unsupported(
            "its tokenizer is neither byte-level BPE (tokenizer.json) nor SentencePiece (tokenizer.model)"
        )
    return description


def _pre_tokenizer(description: dict[str, Any]) -> str:
    whole = description["pre_tokenizer"]
    steps = tuple(
        step.get("pattern", {}).get("Regex") or {"ByteLevel": GPT2, "Digits": DIGITS}.get(step["type"], step["type"])
        for step in whole.get("pretokenizers", [whole])
        if step["type"] != "ByteLevel" or step.get("use_regex", True)
    )
    name = PRE_TOKENIZERS.get((steps, bool(description["model"].get("ignore_merges"))))
    if name is None:
        raise unsupported(f"llama.cpp has no name for how its tokenizer takes words apart: {', '.join(steps)[:200]}")
    return name
