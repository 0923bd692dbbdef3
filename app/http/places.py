"""Places of a limited number, so that one API key cannot take what all keys share."""

import uuid
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

from app.http.problem import Problem
from secateur.contract.errors import ErrorCode

SOON = "5"
"""Number of seconds after which a place may be free (``Retry-After``)."""


class Places:
    """The places that requests of this process hold, at most ``each`` of one API key; for one event loop."""

    def __init__(self, each: int) -> None:
        self.each = each
        self._held: Counter[uuid.UUID] = Counter()

    def __len__(self) -> int:
        return self._held.total()

    def are_taken(self, key_id: uuid.UUID) -> bool:
        """Return whether the API key holds as many places as it may."""
        return self._held[key_id] >= self.each

    @contextmanager
    def taken(self, key_id: uuid.UUID, what: str) -> Iterator[None]:
        """Hold a place of this API key while the context lasts. ``what`` names the places, in the plural.

        Raises:
            Problem: 429 with ``Retry-After`` if the key holds as many places as it may.
        """
        if self.are_taken(key_id):
            detail = f"This API key has {self.each} {what} at once, as many as it may have."
            raise Problem(429, ErrorCode.TOO_MANY_AT_ONCE, detail, headers={"Retry-After": SOON})
        self._held[key_id] += 1
        try:
            yield
        finally:
            self._held[key_id] -= 1
            if not self._held[key_id]:
                del self._held[key_id]
