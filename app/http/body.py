"""Reading of JSON bodies. A body is counted before it is parsed, and no step holds the event loop for long.

The values that a small body can hold cost far more time and memory than their bytes: ``[],`` is 3 bytes and a list of
56. A linear scan therefore limits the number of names and values, their depth and their length, and only then is the
body parsed. Texts are limited by the size of the body alone.
"""

import json
import re
from collections.abc import Mapping
from json.decoder import JSONDecoder
from json.scanner import py_make_scanner  # type: ignore[attr-defined]
from types import UnionType
from typing import Any, get_args

from fastapi import Request
from pydantic import BaseModel, ValidationError
from starlette.requests import ClientDisconnect

from app.http.fields import problem_of
from app.http.places import Places
from app.http.problem import Problem, excerpt, invalid
from app.http.turns import Turns
from secateur.contract.errors import ErrorCode

MOST_NAMES = 200
"""Largest number of names of fields; the longest requests have some 150, with all labels that they may have."""
MOST_VALUES = 25_000
"""Largest number of values; the longest lists of a request are two of 10,000 texts."""
DEEPEST = 20
LONGEST_STRING = 12_000_000
"""Largest number of bytes of a string: a text of a million characters, each escaped as a pair of surrogates."""
LONGEST_NUMBER = 100
LONGEST_GAP = 65_536
LARGE = 2**20
"""Number of bytes from which a body is large. Large bodies are parsed one at a time, and few of one key are held.

Small bodies do not wait for large ones, and the keys' bodies of either size are parsed in turn.
"""

_TOKEN = re.compile(
    rb'(?P<string>")|(?P<opens>[\[{])|(?P<closes>[\]}])|(?P<long_number>[-0-9][-+.0-9eE]{100,65536}+)|(?P<literal>[^\s,:\[\]{}"]{1,65537}+)|[\s,:]{1,65537}+'
)
_INSIDE = re.compile(rb'(?:[^"\\]++|\\.){0,65536}+', re.DOTALL)  # in parts: one match holds the interpreter's lock
_NAME = re.compile(rb'"\s*+:')
_JSON = re.compile(r"application/([^\s;/]+\+)?json\s*(;.*)?", re.IGNORECASE)
_small_places, _small_turns = Places(each=64), Turns(2)  # more threads would take too much of the interpreter's lock
_large_places, _large_turns = Places(each=4), Turns(1)


class ReadRequest(Request):
    """A request whose body was read and validated; FastAPI takes the ``model`` from :meth:`json` as it is."""

    def __init__(self, request: Request, model: BaseModel) -> None:
        super().__init__(request.scope, request.receive)
        self._model = model

    async def body(self) -> bytes:
        return b"{}"  # FastAPI asks only whether there is a body

    async def json(self) -> BaseModel:
        return self._model


async def read(request: Request, model: type[BaseModel] | UnionType) -> Request:
    """Return the request with its body as an instance of ``model``; a request without a body is returned unchanged.

    ``model`` may be a union of models, see :func:`parse`.

    Raises:
        Problem: 400, 413, 415, 422 or 429: the body is not UTF-8 or ended early, is too large, is not of a JSON type,
            is not what ``model`` allows, or the API key is sending as many bodies of this size as it may.
    """
    headers = request.headers
    size = int(headers.get("content-length", 0))
    chunked = "transfer-encoding" in headers
    if not size and not chunked:
        return request
    _check_type(headers.get("content-type"), headers.get("content-encoding", "identity"))
    large = size >= LARGE or chunked
    places, turns = (_large_places, _large_turns) if large else (_small_places, _small_turns)
    key_id = request.state.owner.id
    with places.taken(key_id, "large bodies" if large else "bodies"):
        content = await _receive(request)
        return ReadRequest(request, await turns.run(key_id, parse, content, model))


def _check_type(content_type: str | None, encoding: str) -> None:
    if content_type is None or not _JSON.fullmatch(content_type.strip()):
        given = "has no Content-Type" if content_type is None else f"is of the type '{excerpt(content_type)}'"
        detail = f"The body {given}; send 'Content-Type: application/json'."
        raise Problem(415, ErrorCode.UNSUPPORTED_MEDIA_TYPE, detail, headers={"Accept": "application/json"})
    if encoding != "identity":
        detail = f"The body has the encoding '{excerpt(encoding)}'; send it without a Content-Encoding."
        raise Problem(415, ErrorCode.UNSUPPORTED_MEDIA_TYPE, detail, headers={"Accept-Encoding": "identity"})


async def _receive(request: Request) -> bytes:
    try:
        return await request.body()
    except ClientDisconnect:
        raise Problem(400, ErrorCode.MALFORMED_REQUEST, "The body ended early.") from None


def parse(content: bytes, model: type[BaseModel] | UnionType) -> BaseModel:
    """Return the JSON text ``content`` as an instance of ``model``.

    Of a union, the body is meant as the last model whose required fields it all has, or else as the first model.

    Raises:
        Problem: 400 if the content is not UTF-8, 422 if it is not what ``model`` allows.
    """
    value = decode(content)
    meant = _meant(model, value)
    try:
        return meant.model_validate(value)
    except ValidationError as error:
        raise problem_of(error.errors(include_url=False, include_input=False), meant) from None


def decode(content: bytes) -> Any:
    """Return the value of the JSON text ``content``.

    Raises:
        Problem: 400 if the content is not UTF-8 (RFC 8259, section 8.1), 422 if it is not JSON, or has too many names or
            values.
    """
    check_counts(content)
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        detail = f"The body is not UTF-8: {error.reason} at byte {error.start}."
        raise Problem(400, ErrorCode.MALFORMED_REQUEST, detail) from None
    try:
        return (_small if len(content) < LARGE else _large).decode(text)
    except json.JSONDecodeError as error:
        raise invalid("body", f"not JSON: {error.msg} at character {error.pos}") from None


def _meant(model: Any, value: Any) -> type[BaseModel]:
    """Return the model of a union that ``value`` is meant as, so that its errors are those of one model."""
    models: tuple[type[BaseModel], ...] = get_args(model) or (model,)
    if not isinstance(value, Mapping):
        return models[0]
    required = {
        each: {field.alias or name for name, field in each.model_fields.items() if field.is_required()}
        for each in models
    }
    return next((each for each in reversed(models) if required[each] <= value.keys()), models[0])


def check_counts(content: bytes) -> None:
    """Check the number of names and values in a JSON text, their depth and their length, in one linear scan.

    The text need not be JSON; the parser finds what is wrong with it.

    Raises:
        Problem: 422 if the text has too many names or values, or if one is too deep or too long.
    """
    if len(content) < LARGE and _has_few_marks(content):
        return
    names = values = depth = at = 0
    while at < len(content):
        found = _TOKEN.match(content, at)
        assert found is not None, "every byte belongs to a token"
        begin, at = at, found.end()
        match found.lastgroup:
            case "string":
                at = _end_of_string(content, at)
                _check(at - begin - 1, LONGEST_STRING, "a text of more than {} bytes")
                name = _NAME.match(content, at)
                names, values, at = (names + 1, values, name.end()) if name else (names, values + 1, at + 1)
                _check(names, MOST_NAMES, "more than {} names of fields")
            case "opens":
                depth, values = depth + 1, values + 1
                _check(depth, DEEPEST, "nested more than {} deep")
            case "closes":
                depth -= 1
            case "long_number":  # JSONDecoder would match it in one piece, which holds the interpreter's lock
                raise _long_number()
            case "literal":
                values += 1
            case None:
                _check(at - begin, LONGEST_GAP, "a gap of more than {} spaces")
        _check(values, MOST_VALUES, "more than {} values")


def _has_few_marks(content: bytes) -> bool:
    """Return whether even the marks inside and outside of strings are too few to exceed a limit."""
    opened = content.count(b"[") + content.count(b"{")
    return (
        opened <= DEEPEST
        and content.count(b":") <= MOST_NAMES
        and content.count(b'"') <= 2 * MOST_NAMES
        and content.count(b",") + opened < MOST_VALUES
    )


def _end_of_string(content: bytes, at: int) -> int:
    """Return the position of the quote that ends the string whose inside begins at ``at``, or of the content's end."""
    quote = content.find(b'"', at)
    if quote >= 0 and content.find(b"\\", at, quote) < 0:
        return quote
    while found := _INSIDE.match(content, at):
        if found.end() == at:
            break
        at = found.end()
    return at


def _check(count: int, most: int, message: str) -> None:
    if count > most:
        raise invalid("body", message.format(f"{most:,}"), allowed=f"at most {most:,}")


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        seen: set[str] = set()
        twice = next(name for name, _ in pairs if name in seen or seen.add(name))  # type: ignore[func-returns-value]
        raise invalid(twice, "the name occurs twice in one object")
    return found


def _number(text: str) -> str:
    if len(text) > LONGEST_NUMBER:
        raise _long_number()
    return text


def _long_number() -> Problem:
    return invalid("body", f"a number of more than {LONGEST_NUMBER} digits", allowed=f"at most {LONGEST_NUMBER}")


def _no_number(name: str) -> float:
    raise invalid("body", f"not JSON: '{name}' is no number (RFC 8259)")


def _decoder() -> JSONDecoder:
    return JSONDecoder(
        object_pairs_hook=_object,
        parse_int=lambda text: int(_number(text)),
        parse_float=lambda text: float(_number(text)),
        parse_constant=_no_number,
    )


_small, _large = _decoder(), _decoder()
_large.scan_once = py_make_scanner(_large)  # type: ignore[attr-defined]  # the scanner in C holds the interpreter's lock to the end
