"""Log lines that name their request, job and attempt. The lines are text, or JSON with one object per line."""

import logging
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from pythonjsonlogger.core import RESERVED_ATTRS
from pythonjsonlogger.json import JsonFormatter

from app.config import Settings

NAMES = ("request_id", "job_id", "attempt")
TEXT = "%(asctime)s %(levelname)s %(name)s%(about)s: %(message)s"
_about: ContextVar[dict[str, object]] = ContextVar("about", default={})  # noqa: B039  # never mutated; each change sets a new dict


@contextmanager
def about(**what: object) -> Iterator[None]:
    """Attach the given values (names from :data:`NAMES`) to the log lines of this thread or task within the context."""
    token = _about.set({**_about.get(), **{name: value for name, value in what.items() if value is not None}})
    try:
        yield
    finally:
        _about.reset(token)


def request_id() -> str | None:
    """Return the id of the HTTP request that is being answered, or ``None`` outside a request."""
    known = _about.get().get("request_id")
    return None if known is None else str(known)


def configure(settings: Settings) -> None:
    """Make this process log to standard error in the configured format; existing handlers keep their destinations."""
    logging.basicConfig(level=logging.INFO)
    for name in ("", "uvicorn", "uvicorn.access"):
        adopt(logging.getLogger(name).handlers, settings)


def adopt(handlers: Iterable[logging.Handler], settings: Settings) -> None:
    """Make these handlers write in the format of :func:`configure`."""
    for handler in handlers:
        handler.addFilter(_tell)
        handler.setFormatter(_formatter(settings))


def _tell(record: logging.LogRecord) -> bool:
    known = _about.get()
    record.__dict__.update(known)
    record.about = "".join(f" {name}={known[name]}" for name in NAMES if name in known)
    return True


def _formatter(settings: Settings) -> logging.Formatter:
    if settings.log_format == "text":
        return logging.Formatter(TEXT)
    return JsonFormatter(
        "{levelname}{name}{message}",
        style="{",
        rename_fields={"levelname": "level", "name": "logger"},
        reserved_attrs=[*RESERVED_ATTRS, "about", "color_message"],
        timestamp="time",
    )
