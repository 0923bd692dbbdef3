"""A parser of Server-Sent Events (HTML standard, section 9.2.6), which reads one line at a time."""

import json
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Frame:
    """A frame of an event stream.

    ``event`` is the type of a job's event, ``progress`` or ``end``. ``id`` is the id of a job's event; it is ``None``
    in the frames ``progress`` and ``end``.
    """

    event: str
    data: Any
    id: int | None


@dataclass
class Frames:
    """A parser that receives lines and returns frames."""

    _fields: dict[str, str] = field(default_factory=dict)

    def take(self, line: str) -> Frame | None:
        """Read a line, and return the frame that the line ends, or ``None`` if the line ends no frame."""
        if line:
            name, _, value = line.partition(":")
            value = value.removeprefix(" ")
            self._fields[name] = (
                f"{self._fields['data']}\n{value}" if name == "data" and "data" in self._fields else value
            )
            return None
        fields, self._fields = self._fields, {}
        if "data" not in fields:
            return None  # the frame is a comment that keeps the connection alive
        event_id = fields.get("id")
        return Frame(fields.get("event", "message"), json.loads(fields["data"]), int(event_id) if event_id else None)
