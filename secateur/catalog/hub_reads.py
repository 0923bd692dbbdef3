"""Small reads from the Hub, each of which ends: with a timeout, a deadline and a largest size, and without retries."""

import json
import time
from typing import Any
from urllib.parse import quote

import httpx2
from huggingface_hub import constants, get_session
from huggingface_hub.utils import build_hf_headers, hf_raise_for_status

CONNECT_SECONDS = 5.0
READ_SECONDS = 10.0
"""Longest wait for the next bytes of an answer."""
WHOLE_SECONDS = 30.0
"""Longest time from the first to the last byte of an answer."""
LARGEST_ANSWER = 32 * 2**20
"""Largest number of bytes of an answer of the Hub's API; a repository of 100,000 files has about 10 MB."""


class TooLarge(ValueError):
    """The answer has more bytes than may be read; the message says how many."""


def read(path: str, endpoint: str | None, token: str | bool | None, most: int) -> bytes:
    """Return what the Hub answers to ``GET path``; a ``token`` of ``False`` sends no token at all.

    Raises:
        huggingface_hub.errors.HfHubHTTPError: the Hub answers with an error.
        httpx2.HTTPError: the Hub cannot be reached, or does not answer in time.
        TooLarge: the answer has more than ``most`` bytes; no more than about these were read.
    """
    timeout = httpx2.Timeout(READ_SECONDS, connect=CONNECT_SECONDS)
    # A compressed answer could be small and become large.
    headers = build_hf_headers(token=token) | {"Accept-Encoding": "identity"}
    url = f"{(endpoint or constants.ENDPOINT).rstrip('/')}{path}"
    found = bytearray()
    with get_session().stream("GET", url, headers=headers, timeout=timeout, follow_redirects=True) as response:
        if response.is_error:
            response.close()  # otherwise huggingface_hub reads a body of any size
            hf_raise_for_status(response)
        deadline = time.monotonic() + WHOLE_SECONDS
        for part in response.iter_raw():
            found += part
            if len(found) > most:
                raise TooLarge(f"it has more than {most:,} bytes")
            if time.monotonic() > deadline:
                raise httpx2.ReadTimeout(f"the answer took more than {WHOLE_SECONDS:.0f} seconds")
    return bytes(found)


def model_info(
    model_id: str, revision: str | None, endpoint: str | None, token: str | bool | None
) -> tuple[str, set[str]]:
    """Return the commit of a model's revision, and the names of the commit's files.

    Raises:
        huggingface_hub.errors.HfHubHTTPError, httpx2.HTTPError: as :func:`read`.
        ValueError: the answer is not what the Hub answers, or is too large.
    """
    path = f"/api/models/{model_id}" + (f"/revision/{quote(revision, safe='')}" if revision else "")
    info = json.loads(read(path, endpoint, token, LARGEST_ANSWER))
    try:
        return str(info["sha"]), {str(sibling["rfilename"]) for sibling in info.get("siblings") or ()}
    except (KeyError, TypeError, AttributeError):
        raise ValueError("the Hub's answer describes no model") from None


def whoami(endpoint: str | None, token: str) -> dict[str, Any]:
    """Return the Hub's description of the account that ``token`` belongs to.

    Raises:
        huggingface_hub.errors.HfHubHTTPError, httpx2.HTTPError: as :func:`read`.
        ValueError: the answer is not what the Hub answers, or is too large.
    """
    me = json.loads(read("/api/whoami-v2", endpoint, token, LARGEST_ANSWER))
    if not isinstance(me, dict) or not isinstance(me.get("name"), str):
        raise ValueError("the Hub's answer names no account")
    return me
