"""Byte ranges of a request (RFC 9110, section 14)."""

import re

RANGE = re.compile(r"bytes=(\d*)-(\d*)")


class RangeMalformed(Exception):
    """The header is not a byte range."""


class RangeNotSatisfiable(Exception):
    """The file has no byte of the range."""


def parse(header: str, size: int) -> tuple[int, int] | None:
    """Return the start and the exclusive end of the one range in a ``Range`` header, for a file of ``size`` bytes.

    Return ``None`` for several ranges; a server may then send the whole file (RFC 9110, section 14.2).

    Raises:
        RangeMalformed: the header is not a byte range.
        RangeNotSatisfiable: the file has no byte of the range.
    """
    if "," in header:
        return None
    match = RANGE.fullmatch(header.strip())
    if match is None or match[0].endswith("=-"):
        raise RangeMalformed
    first, last = match[1], match[2]
    if not first:
        start, end = max(size - int(last), 0), size
    else:
        start, end = int(first), min(int(last) + 1, size) if last else size
        if last and int(last) < int(first):
            raise RangeMalformed
    if start >= end:
        raise RangeNotSatisfiable
    return start, end
