"""The one error that says why a model cannot be pruned as asked; API, engine and command line all show it."""

from typing import Any


class PruningError(Exception):
    """A job cannot be done. ``code`` is stable, ``message`` says what to do, ``retryable`` whether trying again may help.

    ``field`` names the request field at fault, where there is one.
    """

    def __init__(self, code: str, message: str, *, retryable: bool = False, field: str | None = None) -> None:
        super().__init__(message)
        self.code = code
        self.message = message
        self.retryable = retryable
        self.field = field

    def as_dict(self) -> dict[str, Any]:
        """As stored in ``jobs.error`` and shown by the API."""
        return {"code": self.code, "message": self.message, "retryable": self.retryable, "field": self.field}
