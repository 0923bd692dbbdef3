"""A bound on the time that a model's own files may keep this process busy, such as a tokenizer's regular expressions."""

import contextvars
import threading
from collections.abc import Callable
from typing import Any, TypeVar

from secateur.contract.errors import ErrorCode, PruningError

TOKENIZER_SECONDS = 120.0
CHARACTERS_PER_SECOND = 20_000
"""Speed below which a tokenizer counts as hung; usual ones are a hundred times as fast."""
BUILD_SECONDS = 300.0
"""Time in which a model without an adapter is built without weights."""

T = TypeVar("T")


def within(seconds: float, refusal: PruningError, work: Callable[[], T]) -> T:
    """Return the result of ``work``, or raise ``refusal`` if there is none after ``seconds``.

    Python cannot stop a thread. After a refusal the thread of ``work`` goes on until the process ends; it keeps no
    process alive. Native code that holds the interpreter's lock cannot be observed from within the process; the
    supervisor of a job kills such a process after ``SECATEUR_STALL_TIMEOUT``.

    Raises:
        PruningError: ``refusal``.
        BaseException: the exception that ``work`` raised.
    """
    results: list[T] = []
    errors: list[BaseException] = []

    def run() -> None:
        try:
            results.append(work())
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=contextvars.copy_context().run, args=(run,), daemon=True)
    thread.start()
    thread.join(seconds)
    if errors:
        raise errors[0]
    if not results:
        raise refusal
    return results[0]


def with_tokenizer(characters: int, work: Callable[[], T]) -> T:
    """Return the result of ``work``, in which a tokenizer is loaded or reads a text of ``characters`` characters.

    Raises:
        PruningError: ``tokenizer_unusable`` if the work does not end in time, or if the tokenizer's native code fails.
    """
    seconds = TOKENIZER_SECONDS + characters / CHARACTERS_PER_SECOND
    refusal = _unusable(
        f"The model's tokenizer did not finish within {seconds:.0f} seconds; a regular expression in tokenizer.json that "
        "backtracks is the usual cause."
    )
    try:
        return within(seconds, refusal, work)
    except Exception:
        raise
    except BaseException as error:
        if type(error).__name__ != "PanicException":  # the class that PyO3 raises for a panic; no module exports it
            raise
        raise _unusable(f"The model's tokenizer failed: {str(error)[:200]}.") from None


def _unusable(message: str) -> PruningError:
    return PruningError(ErrorCode.TOKENIZER_UNUSABLE, message, field="model_id")


def encode(tokenizer: Any, text: str, **options: Any) -> list[int]:
    """Return the token ids of ``text``; ``options`` are those of the tokenizer's call.

    Raises:
        PruningError: ``tokenizer_unusable``.
    """
    found: list[int] = with_tokenizer(len(text), lambda: tokenizer(text, **options)["input_ids"])
    return found
