"""A decoder with a smaller vocabulary: its model, its tokenizer, and everything that follows from their tokens."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from transformers import PreTrainedTokenizerBase

from secateur.engine.model.decoder import Decoder, opening_of
from secateur.engine.structures.vocabulary.files import cut_tokenizer
from secateur.engine.structures.vocabulary.kept import Vocabulary
from secateur.engine.structures.vocabulary.names import renumber_config
from secateur.engine.structures.vocabulary.tables import TableBytes, cut_model


@dataclass(frozen=True)
class VocabularyCut:
    """The cut of a decoder's vocabulary, with what its files are written from."""

    vocabulary: Vocabulary
    tables: TableBytes
    tokenizer: PreTrainedTokenizerBase
    """The tokenizer of the source."""
    loaded: Mapping[str, Any]
    """The source's config as it was loaded."""

    def config(self, source: Mapping[str, Any]) -> dict[str, Any]:
        """Return the content of the source's ``config.json`` with new token ids and the new size.

        Raises:
            PruningError: ``vocabulary_unsupported``.
        """
        return renumber_config(source, self.vocabulary, self.loaded)


def cut_decoder(decoder: Decoder, vocabulary: Vocabulary) -> None:
    """Keep only the tokens of ``vocabulary`` in a decoder whose vocabulary is still that of the source.

    From then on, the decoder's shape is that of a source with this vocabulary.

    Raises:
        PruningError: ``vocabulary_unsupported``, ``tokenizer_unusable``.
    """
    source, loaded = decoder.tokenizer, decoder.model.config.to_dict()
    decoder.tokenizer = cut_tokenizer(source, vocabulary)
    tables = cut_model(decoder.model, vocabulary)
    before = decoder.shape.vocabulary_parameters
    shape = replace(decoder.shape, vocab_size=vocabulary.size)
    left = shape.other_parameters - before + shape.vocabulary_parameters
    decoder.shape = replace(shape, other_parameters=left)
    decoder.opening = opening_of(decoder.tokenizer, shape.family)
    decoder.vocabulary = VocabularyCut(vocabulary, tables, source, loaded)
