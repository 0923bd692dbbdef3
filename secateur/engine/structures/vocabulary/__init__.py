"""The structure ``vocabulary``: tokens that the user's texts do not need leave the tokenizer and the model.

The order of use: :func:`named_tokens` and :func:`choose` give a :class:`Choice`; :func:`cut_decoder` cuts what is in
memory, by :func:`cut_model` and :func:`cut_tokenizer`; :func:`rewrite_files` and :func:`renumber_config` cut what is
published.
"""

from secateur.engine.structures.vocabulary.choose import Choice, choose
from secateur.engine.structures.vocabulary.cut import VocabularyCut, cut_decoder
from secateur.engine.structures.vocabulary.files import cut_tokenizer, rewrite_files
from secateur.engine.structures.vocabulary.kept import Vocabulary
from secateur.engine.structures.vocabulary.names import named_tokens, renumber_config
from secateur.engine.structures.vocabulary.tables import TableBytes, cut_model

__all__ = [
    "Choice",
    "TableBytes",
    "Vocabulary",
    "VocabularyCut",
    "choose",
    "cut_decoder",
    "cut_model",
    "cut_tokenizer",
    "named_tokens",
    "renumber_config",
    "rewrite_files",
]
