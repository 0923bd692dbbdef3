"""Names that resemble a misspelt one, for error messages."""

from collections.abc import Iterable
from difflib import get_close_matches

MOST = 3


def near(name: str, known: Iterable[str]) -> list[str]:
    """Return up to :data:`MOST` names of ``known`` that resemble ``name``, the nearest first.

    An error message names these alone, because ``known`` may be long, and not every reader may know all of it.
    """
    return get_close_matches(name[:200], known, MOST)


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return the names near ``name`` as the end of a sentence, or an empty text if there are none."""
    found = near(name, known)
    return f"; did you mean {' or '.join(found)}?" if found else "."
