"""The models of the ``tokenizers`` library: which pieces they cannot do without, and how they are cut.

A model is the entry ``model`` of a ``tokenizer.json``, see https://huggingface.co/docs/tokenizers/api/models.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from itertools import pairwise
from typing import Any

from secateur.engine.structures.vocabulary.kept import Vocabulary, unsupported

SPACE = "▁"
"""The character by which SentencePiece writes a space."""
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
"""The pieces by which a model with byte fallback writes the bytes of characters that have no piece."""


class Pieces(ABC):
    """The pieces of a tokenizer's model, by text and by id."""

    def __init__(self, ids: Mapping[str, int], byte_fallback: bool) -> None:
        self.ids = ids
        self.texts = {index: text for text, index in ids.items()}
        self.byte_fallback = byte_fallback and all(piece in ids for piece in BYTES)

    @property
    @abstractmethod
    def unknown(self) -> int | None:
        """The id of the piece for what the model cannot write, or ``None``."""

    @abstractmethod
    def precedence(self, token: int) -> float:
        """Return a number by which pieces that the texts never use are ordered; the most common come first."""

    @abstractmethod
    def parts(self, token: int) -> set[int]:
        """Return the ids of the pieces from which the model makes the piece ``token``."""

    @abstractmethod
    def cut(self, model: Mapping[str, Any], vocabulary: Vocabulary) -> dict[str, Any]:
        """Return the model with only the kept pieces, under their new ids."""

    def irreplaceable(self) -> set[int]:
        """Return the ids of the pieces without which some text could no longer be written.

        With byte fallback, these are the bytes; the characters of ASCII and the space stay too, so that plain text does
        not become bytes. Without byte fallback, all pieces of one character stay, which are the 256 bytes of a
        byte-level model, and all pieces with a character that has no piece of its own.
        """
        always = {self.ids[piece] for piece in BYTES if piece in self.ids}
        if self.unknown is not None:
            always.add(self.unknown)
        if self.byte_fallback:
            return always | {i for text, i in self.ids.items() if len(text) == 1 and (text.isascii() or text == SPACE)}
        return (
            always
            | {i for text, i in self.ids.items() if any(character not in self.ids for character in text)}
            | {i for text, i in self.ids.items() if len(text) == 1}
        )


class BpePieces(Pieces):
    """Byte-pair encoding, byte-level or of SentencePiece."""

    def __init__(self, model: Mapping[str, Any], byte_fallback: bool) -> None:
        for key in ("continuing_subword_prefix", "end_of_word_suffix"):
            if model.get(key):
                raise unsupported(f"the tokenizer's BPE model has a {key}")
        super().__init__(model["vocab"], byte_fallback)
        self._unknown = model.get("unk_token")
        # A pair that stands twice has its later rank, as in the tokenizers library.
        self._ranks = {merge_pair(merge): rank for rank, merge in enumerate(model["merges"])}
        self._made = {left + right: rank for (left, right), rank in reversed(self._ranks.items())}

    @property
    def unknown(self) -> int | None:
        return self.ids.get(self._unknown) if self._unknown is not None else None

    def precedence(self, token: int) -> float:
        """Return the rank of the piece's first merge; pieces that no merge makes come last, by their ids."""
        return self._made.get(self.texts[token], len(self._ranks) + token)

    def parts(self, token: int) -> set[int]:
        """Return all pieces that stand in the text of ``token`` while its merges are applied, one after the other.

        The same pieces stand in every text in which the model makes the piece: until the piece is whole, no merge goes
        beyond its ends. A model that has these pieces and the merges between them therefore makes the piece where the
        source makes it. A piece that the merges cannot make has no parts.
        """
        symbols = list(self.texts[token])
        made = set(symbols)
        while len(symbols) > 1:
            ranks = [self._ranks.get(pair, len(self._ranks)) for pair in pairwise(symbols)]
            first = ranks.index(min(ranks))
            if ranks[first] == len(self._ranks):
                return set()
            symbols[first : first + 2] = [symbols[first] + symbols[first + 1]]
            made.add(symbols[first])
        return {self.ids[symbol] for symbol in made if symbol in self.ids}

    def cut(self, model: Mapping[str, Any], vocabulary: Vocabulary) -> dict[str, Any]:
        kept = cut_ids(model["vocab"], vocabulary)
        return {**model, "vocab": kept, "merges": [merge for merge in model["merges"] if stays(merge, kept)]}


class UnigramPieces(Pieces):
    """The unigram language model of SentencePiece: a text is written by the pieces with the largest sum of scores."""

    def __init__(self, model: Mapping[str, Any], byte_fallback: bool) -> None:
        super().__init__({text: index for index, (text, _) in enumerate(model["vocab"])}, byte_fallback)
        self._scores = [score for _, score in model["vocab"]]
        self._unknown = model.get("unk_id")

    @property
    def unknown(self) -> int | None:
        return self._unknown

    def precedence(self, token: int) -> float:
        return -float(self._scores[token])

    def parts(self, token: int) -> set[int]:
        return set()

    def irreplaceable(self) -> set[int]:
        # The smallest score sets the price of unknown characters, by which texts are taken apart.
        return super().irreplaceable() | {self._scores.index(min(self._scores))}

    def cut(self, model: Mapping[str, Any], vocabulary: Vocabulary) -> dict[str, Any]:
        pieces = model["vocab"]
        kept = [pieces[token] for token in vocabulary.kept if token < len(pieces)]
        unknown = None if self._unknown is None else vocabulary.remap[self._unknown]
        return {**model, "vocab": kept, "unk_id": unknown}


def read_pieces(description: Mapping[str, Any]) -> Pieces:
    """Return the pieces of a tokenizer, of which ``description`` is the content of ``tokenizer.json``.

    Raises:
        PruningError: ``vocabulary_unsupported`` when the tokenizer is neither BPE nor Unigram.
    """
    model = description["model"]
    # Without this step of the decoder, the bytes of a character are shown as they are written: "<0xE2>".
    byte_fallback = bool(model.get("byte_fallback")) and "ByteFallback" in _steps(description.get("decoder"))
    kind = model.get("type")
    if kind == "BPE":
        return BpePieces(model, byte_fallback)
    if kind == "Unigram":
        return UnigramPieces(model, byte_fallback)
    raise unsupported(f"its tokenizer is a {kind} model; allowed: BPE and Unigram")


def merge_pair(merge: str | list[str]) -> tuple[str, str]:
    """Return the two pieces of a merge, which older files write as one text with a space."""
    left, right = merge.split(" ") if isinstance(merge, str) else merge
    return left, right


def stays(merge: str | list[str], kept: Mapping[str, int]) -> bool:
    """Return whether both pieces of a merge and what they make are among ``kept``."""
    left, right = merge_pair(merge)
    return left in kept and right in kept and left + right in kept


def cut_ids(ids: Mapping[str, int], vocabulary: Vocabulary) -> dict[str, int]:
    """Return the kept tokens of ``ids`` with their new ids, in the order of the ids."""
    remap = vocabulary.remap
    kept = ((text, remap[token]) for text, token in ids.items() if token in remap)
    return dict(sorted(kept, key=lambda item: item[1]))


def _steps(decoder: Mapping[str, Any] | None) -> set[str]:
    """Return the types of all steps of a decoder."""
    if decoder is None:
        return set()
    return {decoder["type"]}.union(*(_steps(step) for step in decoder.get("decoders", [])))
