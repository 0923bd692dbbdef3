"""The choice of the tokens that stay: as few as the allowed growth of the texts' token count permits."""

from bisect import bisect_left
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jinja2
import numpy as np
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase

from secateur.contract.errors import ErrorCode, PruningError
from secateur.engine.structures.vocabulary.description import build, cut_description, describe
from secateur.engine.structures.vocabulary.kept import Vocabulary, unsupported
from secateur.engine.structures.vocabulary.pieces import Pieces, read_pieces
from secateur.engine.time_limit import with_tokenizer

FOLDS = 4
"""Number of parts of the texts; each part is held out once."""
TEXTS_AT_ONCE = 32
"""Number of texts whose encodings are in memory at once."""


@dataclass(frozen=True)
class Choice:
    """The tokens that stay, and by how much held-out texts grow: 0.01 means that they have 1 % more tokens."""

    vocabulary: Vocabulary
    growth: float


def choose(
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    rows: int,
    named: Collection[int] = (),
    max_growth: float = 0.01,
    multiple: int = 64,
) -> Choice:
    """Choose the tokens that stay, of a tokenizer whose model has an embedding of ``rows`` rows.

    The tokens that stay always are those without which a text could not be written, all added tokens, the tokens of
    the chat template's texts, and the ids ``named``. The others are ordered by their use in ``texts``, each after the
    parts from which BPE makes it, and as few of them stay as keep the growth of the token count within
    ``max_growth``. The growth is that of held-out texts: each quarter of the texts is encoded with the tokens that
    the other three quarters would choose, so it is measured on texts that had no say. The number of tokens is rounded
    up to ``multiple`` with the next tokens of the order, so no row is without a token as long as there are tokens.

    Raises:
        PruningError: ``vocabulary_unsupported``; ``invalid_request`` when the texts are empty; ``tokenizer_unusable``.
    """
    # A tokenizer that truncates or pads would miscount.
    description = {**describe(tokenizer), "truncation": None, "padding": None}
    if not any(texts):
        raise PruningError(ErrorCode.INVALID_REQUEST, "There are no texts to choose tokens by.", field="vocabulary")
    pieces, source = read_pieces(description), build(description)
    if (tokens := max(source.get_vocab().values()) + 1) > rows:
        raise unsupported(f"its tokenizer has {tokens} tokens, and its embedding {rows} rows")
    always = {token for token in named if 0 <= token < rows}
    always |= {token["id"] for token in description["added_tokens"]} | pieces.irreplaceable()
    always |= {int(token) for ids in _encode(source, _template_texts(tokenizer)) for token in ids}
    parts = {token: pieces.parts(token) for token in pieces.texts}
    always |= {part for token in always & parts.keys() for part in parts[token]}

    folds = _folds(texts)
    counts = np.array([_count(source, fold, rows) for fold in folds])
    orders = [_order(pieces, parts, always, counts.sum(0) - own, rows) for own in counts]
    lengths = [int(own.sum()) for own in counts]

    sizes = [*range(-(-len(always) // multiple) * multiple, rows, multiple), rows]
    growths: dict[int, float] = {rows: 0.0}

    def fits(index: int) -> bool:
        size = sizes[index]
        if size not in growths:
            written = 0
            for fold, order in zip(folds, orders, strict=True):
                trial = build(cut_description(description, pieces, _first(order, size, rows)))
                written += int(_count(trial, fold, size).sum())
            growths[size] = written / max(sum(lengths), 1) - 1
        return growths[size] <= max_growth

    size = sizes[bisect_left(range(len(sizes) - 1), True, key=fits)]
    vocabulary = _first(_order(pieces, parts, always, counts.sum(0), rows), size, rows)
    _check_numbers(source, build(cut_description(description, pieces, vocabulary)), vocabulary)
    return Choice(vocabulary, growths[size])


def _first(order: Sequence[int], size: int, rows: int) -> Vocabulary:
    return Vocabulary(tuple(sorted(order[:size])), rows)


def _order(
    pieces: Pieces,
    parts: Mapping[int, set[int]],
    always: Collection[int],
    counts: "np.ndarray[Any, Any]",
    rows: int,
) -> list[int]:
    """Return all rows: first ``always``, then the pieces by use, each after its parts, and last rows without a piece."""
    order = dict.fromkeys(sorted(always))
    for token in sorted(pieces.texts, key=lambda token: (-counts[token], pieces.precedence(token))):
        if token not in order:
            order.update(dict.fromkeys(sorted(parts[token] - {token})))
            order[token] = None
    order.update(dict.fromkeys(range(rows)))
    return list(order)


def _folds(texts: Sequence[str]) -> list[list[str]]:
    """Return the texts in parts of about the same number of characters; each part is contiguous.

    A text that reaches into the next part is split at the end of a line where it has one.
    """
    total = sum(map(len, texts))
    folds: list[list[str]] = [[] for _ in range(FOLDS)]
    done = 0
    for text in texts:
        while text:
            index = min(done * FOLDS // total, FOLDS - 1)
            room = -(-total * (index + 1) // FOLDS) - done
            cut = len(text) if len(text) <= room else (text.find("\n", room) + 1 or len(text))
            folds[index].append(text[:cut])
            done, text = done + cut, text[cut:]
    return folds


def _count(tokenizer: Tokenizer, texts: Sequence[str], rows: int) -> "np.ndarray[Any, Any]":
    """Return how often ``texts`` use each token, ``[rows]``."""
    counts = np.zeros(rows, dtype=np.int64)
    for start in range(0, len(texts), TEXTS_AT_ONCE):
        for ids in _encode(tokenizer, texts[start : start + TEXTS_AT_ONCE]):
            counts += np.bincount(ids, minlength=rows)
    return counts


def _encode(tokenizer: Tokenizer, texts: Sequence[str]) -> "list[np.ndarray[Any, Any]]":
    def encode() -> "list[np.ndarray[Any, Any]]":
        encodings = tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        return [np.array(encoding.ids, dtype=np.int64) for encoding in encodings]

    return with_tokenizer(sum(map(len, texts)), encode)


def _template_texts(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Return the texts that the chat templates of a tokenizer may write."""
    templates = tokenizer.chat_template or {}
    if not isinstance(templates, Mapping):
        templates = {"default": templates}
    return [text for template in templates.values() for text in _literals(template)]


def _literals(template: str) -> Iterator[str]:
    # The tokens of the Jinja language are read, since transformers' own blocks do not parse elsewhere.
    lexer = jinja2.Environment(trim_blocks=True, lstrip_blocks=True).lexer
    try:
        for token in lexer.tokenize(template):
            if token.type in ("data", "string"):
                yield str(token.value)
    except jinja2.TemplateSyntaxError as error:
        raise unsupported(f"its chat template cannot be read: {error}") from None


def _check_numbers(source: Tokenizer, cut: Tokenizer, vocabulary: Vocabulary) -> None:
    """Check that the tokenizer library gives every kept token its new id.

    The library numbers added tokens by itself, in their order.

    Raises:
        PruningError: ``vocabulary_unsupported``.
    """
    for old, new in vocabulary.remap.items():
        text = source.id_to_token(old)
        if text != cut.id_to_token(new):
            raise unsupported(f"its tokenizer does not number the token {text!r} as its tokenizer.json does")
