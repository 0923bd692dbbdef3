"""The checks on an uploaded data set, which run while the data set arrives and keep at most one line in memory."""

import codecs
from typing import Annotated, Any, Protocol

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from app.http import body
from app.http.fields import problem_of
from app.http.problem import Problem, invalid
from secateur.catalog.spec import LONGEST_TEXT, Text
from secateur.contract.datasets import DatasetKind
from secateur.contract.errors import ErrorCode

LONGEST_LINE = 4 * 2**20
"""Largest number of bytes of a line of JSON, which is parsed in one piece. Lines of plain text have no limit."""
ALLOWED = """UTF-8; in JSON Lines, each line is {"text": …} or {"messages": [{"role": …, "content": …}, …]}"""


class Content(Protocol):
    """The checks on one kind of content; ``kind`` and ``lines`` are known after :meth:`close`."""

    @property
    def kind(self) -> DatasetKind: ...

    @property
    def lines(self) -> int: ...

    def feed(self, piece: bytes) -> None:
        """Check the next bytes of the content.

        Raises:
            Problem: 422 ``text_invalid`` with the number of the first line at fault.
        """

    def close(self) -> None:
        """Check what can be checked only at the end.

        Raises:
            Problem: 422 ``text_invalid``.
        """


class PlainText:
    """The checks on a plain text: it is UTF-8 without NUL characters, and it is not blank."""

    kind = DatasetKind.TEXT

    def __init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")()
        self._breaks = 0
        self._within_line = False
        self._blank = True

    @property
    def lines(self) -> int:
        return self._breaks + self._within_line

    def feed(self, piece: bytes) -> None:
        self._take(piece, final=False)

    def close(self) -> None:
        self._take(b"", final=True)
        if self._blank:
            raise invalid("body", "the text is empty", code=ErrorCode.TEXT_INVALID, allowed=ALLOWED)

    def _take(self, piece: bytes, final: bool) -> None:
        try:
            text = self._decoder.decode(piece, final)
        except UnicodeDecodeError as error:
            line = self._breaks + error.object.count(b"\n", 0, error.start) + 1
            raise _wrong(line, f"not UTF-8: {error.reason}") from None
        if (place := text.find("\x00")) >= 0:
            raise _wrong(self._breaks + text.count("\n", 0, place) + 1, "a NUL character")
        if text:
            self._breaks += text.count("\n")
            self._within_line = not text.endswith("\n")
            self._blank = self._blank and not text.strip("\ufeff \t\r\n")


class _Line(BaseModel):
    model_config = ConfigDict(extra="forbid")


class _TextLine(_Line):
    text: Text


class _Message(_Line):
    role: Annotated[str, Field(min_length=1, max_length=64, pattern=r"^[^\x00]*$")]
    content: Annotated[str, Field(max_length=LONGEST_TEXT, pattern=r"^[^\x00]*$")]


class _ChatLine(_Line):
    messages: Annotated[list[_Message], Field(min_length=1)]


class JsonLines:
    """The checks on JSON Lines: all lines are texts, or all lines are chats."""

    kind: DatasetKind

    def __init__(self) -> None:
        self.lines = 0
        self._rest = b""

    def feed(self, piece: bytes) -> None:
        *complete, self._rest = (self._rest + piece).split(b"\n")
        for line in complete:
            self._check(line)
        if len(self._rest) > LONGEST_LINE:
            self._check(self._rest)

    def close(self) -> None:
        if self._rest:
            self._check(self._rest)
        if not self.lines:
            raise invalid("body", "there are no lines", code=ErrorCode.TEXT_INVALID, allowed=ALLOWED)

    def _check(self, line: bytes) -> None:
        self.lines += 1
        if len(line) > LONGEST_LINE:
            raise _wrong(self.lines, f"longer than {LONGEST_LINE:,} bytes")
        try:
            kind = _kind(line)
        except Problem as problem:
            raise _wrong(self.lines, _reason(problem)) from None
        if self.lines == 1:
            self.kind = kind
        elif kind != self.kind:
            names = {DatasetKind.TEXTS: "text", DatasetKind.MESSAGES: "messages"}
            raise _wrong(self.lines, f"it has '{names[kind]}', but line 1 has '{names[self.kind]}'")


def _kind(line: bytes) -> DatasetKind:
    """Return the form of a line.

    Raises:
        Problem: the line has neither form.
    """
    value: Any = body.decode(line)
    if not isinstance(value, dict):
        raise invalid("body", "no JSON object")
    form, kind = (_ChatLine, DatasetKind.MESSAGES) if "messages" in value else (_TextLine, DatasetKind.TEXTS)
    try:
        form.model_validate(value)
    except ValidationError as error:
        raise problem_of(error.errors(include_url=False, include_input=False), form) from None
    return kind


def _reason(problem: Problem) -> str:
    """Return what is wrong with a line, from a problem that takes the line for a body."""
    if problem.errors is None:
        return "not UTF-8"
    first = problem.errors[0]
    return first.message if first.field == "body" else f"{first.field}: {first.message}"


def _wrong(line: int, reason: str) -> Problem:
    return invalid("body", f"line {line}: {reason}", code=ErrorCode.TEXT_INVALID, allowed=ALLOWED)
