"""``Prefer: wait=n`` (RFC 7240, section 4.3): the time for which a client wants the server to hold its answer."""

import re
from typing import Annotated

from fastapi import Depends, Header
from pydantic import WithJsonSchema

LONGEST = 60
_WAIT = re.compile(r'(?:^|[,;])\s*wait\s*=\s*"?(\d{1,9})"?\s*(?=$|[,;])', re.IGNORECASE)


async def wait_seconds(
    prefer: Annotated[
        list[str] | None,
        WithJsonSchema(
            {"type": "string"}
        ),  # repeated fields of a header are one list with commas (RFC 9110, section 5.3)
        Header(description="`wait=n`, 1 to 60: hold the answer for up to n seconds."),
    ] = None,
) -> int | None:
    """Return the requested wait, clamped to 1–60 s, or ``None``; unreadable preferences are ignored (RFC 7240)."""
    found = _WAIT.search(",".join(prefer or ()))
    return min(max(int(found[1]), 1), LONGEST) if found else None


Wait = Annotated[int | None, Depends(wait_seconds)]
