"""Log lines that say which request, which job and which attempt they are about: as text, or as JSON, one object a line."""

import logging
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from pythonjsonlogger.core import RESERVED_ATTRS
from pythonjsonlogger.json import JsonFormatter

from app.config import Settings

NAMES = ("request_id", "job_id", "attempt")
TEXT = "%(asctime)s %(levelname)s %(name)s%(about)s: %(message)s"
_about: ContextVar[dict[str, object]] = ContextVar("about", default={})  # noqa: B039  # never changed, only replaced


@contextmanager
def about(**what: object) -> Iterator[None]:
    """While the context lasts, lines of this thread or task carry these of :data:`NAMES`."""
    token = _about.set({**_about.get(), **{name: value for name, value in what.items() if value is not None}})
    try:
        yield
    finally:
        _about.reset(token)


def request_id() -> str | None:
    """Of the HTTP request that is being answered."""
    known = _about.get().get("request_id")
    return None if known is None else str(known)


def configure(settings: Settings) -> None:
    """Have this process log to standard error in the format that is set; what others have set up stays where it goes."""
    logging.basicConfig(level=logging.INFO)
    for name in ("", "uvicorn", "uvicorn.access"):
        adopt(logging.getLogger(name).handlers, settings)


def adopt(handlers: Iterable[logging.Handler], settings: Settings) -> None:
    """Have these handlers write as :func:`configure` says."""
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
