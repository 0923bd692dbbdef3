"""Reading of the library's calibration and evaluation data.

The data may be texts, names, files, chats, data sets, or loaders of token ids.
"""

from collections.abc import Iterable, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerBase

from secateur.catalog.spec import LONGEST_TEXT
from secateur.contract.errors import ErrorCode, PruningError
from secateur.engine.time_limit import with_tokenizer

"""Largest number of characters in one text of a request."""
MOST_WINDOWS = 65_536
ALLOWED = (
    "a list of texts, the name of a data set, the path of a UTF-8 text file, a list of chats (each a list of messages with 'role' and "
    "'content'), a datasets.Dataset with a column 'text' or 'messages', or a DataLoader of token ids [batch, length]"
)

Given = Mapping[str, Any] | Tensor
"""The fields of a request's text source, or token ids ``[windows, length]`` on the CPU."""


def read_data(data: Any, tokenizer: PreTrainedTokenizerBase | None, field: str) -> Given:
    """Convert ``data`` to the fields of a request's text source, or to token ids.

    ``tokenizer`` applies its chat template to chats. ``field`` is the argument's name, which errors report.

    Raises:
        PruningError: ``invalid_request`` when the type is not allowed or there is no data; ``text_invalid`` when a
            file, a data set or a chat cannot be read as text; the errors of :func:`chat_texts`.
    """
    if isinstance(data, Path) or (isinstance(data, str) and Path(data).is_file()):
        return {"texts": _pieces([_read_file(Path(data), field)])}
    if isinstance(data, str):
        return {"dataset": data}
    if isinstance(data, DataLoader):
        return _token_windows(data, field)
    columns = getattr(data, "column_names", None)
    if columns is not None:
        data = _column(data, columns, field)
    if isinstance(data, Sequence) and data and all(isinstance(item, str) for item in data):
        return {"texts": _pieces(data)}
    if isinstance(data, Sequence) and data and all(_is_chat(item) for item in data):
        return {"texts": _pieces(chat_texts(data, tokenizer, field))}
    shown = "an empty list" if isinstance(data, Sequence) and not data else f"a {type(data).__name__}"
    raise PruningError(ErrorCode.INVALID_REQUEST, f"{field} is {shown}; allowed: {ALLOWED}.", field=field)


def _read_file(path: Path, field: str) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise PruningError(
            ErrorCode.TEXT_INVALID, f"{path} cannot be read as UTF-8 text: {error}", field=field
        ) from None


def _column(data: Any, columns: Sequence[str], field: str) -> Sequence[Any]:
    for name in ("text", "messages"):
        if name in columns:
            return list(islice(data[name], MOST_WINDOWS))
    raise PruningError(
        ErrorCode.TEXT_INVALID,
        f"The data set has the columns {', '.join(columns)}; allowed: a column 'text' or 'messages'.",
        field=field,
    )


def _is_chat(item: Any) -> bool:
    return (
        isinstance(item, Sequence)
        and not isinstance(item, str)
        and bool(item)
        and all(isinstance(message, Mapping) and {"role", "content"} <= message.keys() for message in item)
    )


def chat_texts(chats: Sequence[Any], tokenizer: PreTrainedTokenizerBase | None, field: str) -> list[str]:
    """Return each chat, a list of messages, as the text that the tokenizer's chat template makes of the chat.

    Raises:
        PruningError: ``chat_template_missing``; ``text_invalid`` if the template fails on a chat; ``tokenizer_unusable`` if
            the template does not end in time.
    """
    if tokenizer is None or not tokenizer.chat_template:
        raise PruningError(
            ErrorCode.CHAT_TEMPLATE_MISSING,
            "The tokenizer has no chat template. Give texts, or a tokenizer with a chat template.",
            field=field,
        )
    apply = tokenizer.apply_chat_template

    def render() -> list[str]:
        texts = []
        for number, chat in enumerate(chats, 1):
            try:
                texts.append(str(apply(list(chat), tokenize=False)))
            except Exception as error:  # a template is a program of the model, which may raise anything
                raise PruningError(
                    ErrorCode.TEXT_INVALID,
                    f"The model's chat template fails on chat {number}: {str(error)[:200]}",
                    field=field,
                ) from None
        return texts

    return with_tokenizer(sum(len(str(message["content"])) for chat in chats for message in chat), render)


def _pieces(texts: Iterable[str]) -> list[str]:
    """Join the texts by blank lines and split the result into texts that a request may hold.

    Null characters and empty texts are removed.
    """
    pieces: list[str] = []
    size = LONGEST_TEXT
    for text in texts:
        for start in range(0, max(len(text), 1), LONGEST_TEXT):
            part = text[start : start + LONGEST_TEXT].replace("\x00", "")
            if size + len(part) + 2 > LONGEST_TEXT:
                pieces.append(part)
                size = len(part)
            else:
                pieces[-1] += "\n\n" + part
                size += len(part) + 2
    return [piece for piece in pieces if piece]


def _token_windows(loader: "DataLoader[Any]", field: str) -> Tensor:
    """Return all windows of a loader, cut to the length of the shortest window: ``[windows, length]``."""
    windows: list[Tensor] = []
    for batch in loader:
        ids = (
            batch["input_ids"] if isinstance(batch, Mapping) else batch[0] if isinstance(batch, list | tuple) else batch
        )
        if not isinstance(ids, Tensor) or ids.dim() != 2 or ids.is_floating_point():
            raise PruningError(
                ErrorCode.INVALID_REQUEST,
                f"A batch of {field} holds no token ids; allowed: whole numbers [batch, length], or a mapping with 'input_ids'.",
                field=field,
            )
        windows += list(ids.long().cpu())
        if len(windows) >= MOST_WINDOWS:
            break
    if not windows:
        raise PruningError(ErrorCode.INVALID_REQUEST, f"{field} is an empty DataLoader.", field=field)
    length = min(len(window) for window in windows)
    return torch.stack([window[:length] for window in windows])
