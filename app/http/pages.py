"""Keyset pagination: an opaque ``page_token`` names the last item of the previous page."""

import base64
import binascii
import re
from collections.abc import Callable
from typing import Annotated, TypeVar

from fastapi import Query
from pydantic import AfterValidator

from app.http.problem import invalid

LARGEST = 100
LARGEST_ID = 2**63 - 1
LARGEST_INTEGER = 2**31 - 1
PageSize = Annotated[
    int,
    AfterValidator(lambda size: min(max(size, 1), LARGEST)),
    Query(description=f"Items a page; clamped to 1–{LARGEST}."),
]
PageToken = Annotated[str | None, Query(max_length=200, description="`next_page_token` of the page before.")]

Cursor = TypeVar("Cursor")


def encode(cursor: object) -> str:
    """Return the page token that means "after ``cursor``"."""
    return base64.urlsafe_b64encode(str(cursor).encode()).decode().rstrip("=")


def read_id(text: str) -> int:
    """Return the ``bigint`` id that ``text`` contains, for use with :func:`decode`.

    Raises:
        ValueError: ``text`` is not an id.
    """
    if not re.fullmatch(r"[0-9]{1,19}", text) or int(text) > LARGEST_ID:
        raise ValueError(f"no id: {text}")
    return int(text)


def read_place(text: str) -> tuple[int, int]:
    """Return the two ``integer`` numbers that ``text`` contains, for use with :func:`decode`.

    Raises:
        ValueError: ``text`` is not such a place.
    """
    found = re.fullmatch(r"([0-9]{1,10})\.([0-9]{1,10})", text)
    if found is None or max(int(found[1]), int(found[2])) > LARGEST_INTEGER:
        raise ValueError(f"no place: {text}")
    return int(found[1]), int(found[2])


def decode(token: str | None, read: Callable[[str], Cursor]) -> Cursor | None:
    """Return the cursor in a page token, converted by ``read``, or ``None`` without a token.

    Raises:
        Problem: 422 if this service did not create the token.
    """
    if token is None:
        return None
    try:
        return read(base64.urlsafe_b64decode(token + "=" * (-len(token) % 4)).decode("ascii"))
    except (ValueError, binascii.Error):
        raise invalid("page_token", "not a token of this service", allowed="next_page_token of a former page") from None
