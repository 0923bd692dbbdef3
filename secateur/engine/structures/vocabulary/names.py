"""The token ids that ``config.json``, ``generation_config.json`` and ``tokenizer_config.json`` name."""

import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from transformers import PreTrainedModel

from secateur.engine.structures.vocabulary.kept import Vocabulary, unsupported

TOKEN_KEY = re.compile(r"(^|_)token_(id|ids|index)$|^(begin_)?suppress_tokens$|^(bad|force)_words_ids$")
"""Keys whose values are token ids, or lists of them."""
UNREADABLE_KEY = re.compile(r"token_(id|index)|_to_id$|^forced_decoder_ids$|^sequence_bias$")
"""Other keys whose values, unless empty, hold token ids in a form of their own."""
SIZE_KEYS = ("vocab_size", "padded_vocab_size")
UNRELATED_KEYS = ("type_vocab_size",)


def named_tokens(model: PreTrainedModel) -> set[int]:
    """Return the token ids that the config and the generation config of a model name; these tokens must stay.

    Raises:
        PruningError: ``vocabulary_unsupported`` with the name of a key that holds token ids and cannot be renumbered.
    """
    found: set[int] = set()

    def note(token: int, key: str) -> int:
        found.add(token)
        return token

    rows = model.get_input_embeddings().weight.shape[0]
    for config in _configs(model):
        _renumbered(config.to_dict(), rows, rows, note)
    return {token for token in found if 0 <= token < rows}


def renumber_config(
    config: Mapping[str, Any], vocabulary: Vocabulary, loaded: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Return the content of a config file with new token ids and the new size of the vocabulary.

    ``loaded`` is the source's config as it was loaded, before :func:`secateur.engine.structures.vocabulary.cut_model`:
    its token ids are added where ``config`` has none, because the defaults of a config class name tokens too.

    Raises:
        PruningError: ``vocabulary_unsupported`` with the name of a key that holds token ids and cannot be renumbered.
    """
    defaults = {key: value for key, value in (loaded or {}).items() if TOKEN_KEY.search(key) and value is not None}
    return _renumbered({**defaults, **config}, vocabulary.rows, vocabulary.size, vocabulary.renumber)


def renumber_model(model: PreTrainedModel, vocabulary: Vocabulary) -> None:
    """Renumber the token ids in the config and the generation config of a model in memory.

    Raises:
        PruningError: ``vocabulary_unsupported`` with the name of a key that holds token ids and cannot be renumbered.
    """
    for config in _configs(model):
        changed = _renumbered(config.to_dict(), vocabulary.rows, vocabulary.size, vocabulary.renumber)
        for key, value in changed.items():
            if (TOKEN_KEY.search(key) or key in SIZE_KEYS) and value is not None:
                setattr(config, key, value)


def _configs(model: PreTrainedModel) -> Iterator[Any]:
    yield model.config
    if (text := model.config.get_text_config()) is not model.config:
        yield text
    if model.generation_config is not None:
        yield model.generation_config


def _renumbered(
    config: Mapping[str, Any], rows: int, size: int, renumber: Callable[[int, str], int], path: str = ""
) -> dict[str, Any]:
    """Return ``config`` with ``renumber`` applied to the token ids of all keys, and ``size`` in place of ``rows``."""
    result: dict[str, Any] = {}
    for key, value in config.items():
        name = f"{path}{key}"
        if value is None or value in ([], {}):
            result[key] = value
        elif TOKEN_KEY.search(key):
            result[key] = _ids(value, name, renumber)
        elif UNREADABLE_KEY.search(key):
            raise unsupported(f"the key {name} of the model's configuration holds token ids that cannot be renumbered")
        elif "vocab" in key and type(value) is int and key not in UNRELATED_KEYS:
            if key not in SIZE_KEYS or value != rows:
                raise unsupported(
                    f"the key {name} of the model's configuration is {value}, the size of another vocabulary than that "
                    f"of the embedding, which has {rows} rows"
                )
            result[key] = size
        elif isinstance(value, Mapping) and all(isinstance(inner, str) for inner in value):
            result[key] = _renumbered(value, rows, size, renumber, f"{name}.")
        else:
            result[key] = value
    return result


def _ids(value: Any, name: str, renumber: Callable[[int, str], int]) -> Any:
    if type(value) is int:
        return renumber(value, name)
    if isinstance(value, list | tuple):
        return [_ids(each, name, renumber) for each in value]
    raise unsupported(f"the key {name} of the model's configuration holds {type(value).__name__} in place of token ids")
