"""Write docs/errors.md from :class:`secateur.contract.errors.ErrorCode`: ``make errors``.

A test checks that the page is complete.
"""

from pathlib import Path

from secateur.contract.errors import ErrorCode

PAGE = Path(__file__).parents[1] / "docs" / "errors.md"
HEAD = """# Errors

Every error has a stable code. The service's problem documents (RFC 9457), the `error` of a failed job, the exception `PruningError` of
the library and the messages of the command line use the same codes. The message beside the code names the field at fault and what is
allowed there; a program should read the code, a person the message.

*Retryable* says whether the same request may succeed later without a change. A job that fails with a retryable code is queued again by
itself, up to `SECATEUR_MAX_FAILURES` times; a job that fails with another code is not. The HTTP API sends `Retry-After` with those
that a client may repeat.

This page is made from `secateur/contract/errors.py` by `make errors`.

| code | meaning | retryable | what to do |
|---|---|---|---|
"""


def page() -> str:
    """Return the page as text."""
    rows = (
        f"| `{code}` | {code.meaning} | {'yes' if code.retryable else 'no'} | {code.advice} |" for code in ErrorCode
    )
    return HEAD + "\n".join(rows) + "\n"


if __name__ == "__main__":
    PAGE.write_text(page())
