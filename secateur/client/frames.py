"""Server-Sent Events (HTML standard, section 9.2.6), line by line."""

import json
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Frame:
    """``event``: an event's type, ``progress`` or ``end``; ``id`` is the event's, ``None`` of the other two."""

    event: str
    data: Any
    id: int | None


@dataclass
class Frames:
    """Lines in, frames out."""

    _fields: dict[str, str] = field(default_factory=dict)

    def take(self, line: str) -> Frame | None:
        """The frame that this line ends, if it ends one."""
        if line:
            name, _, value = line.partition(":")
            value = value.removeprefix(" ")
            self._fields[name] = (
                f"{self._fields['data']}\n{value}" if name == "data" and "data" in self._fields else value
            )
            return None
        fields, self._fields = self._fields, {}
        if "data" not in fields:
            return None  # a comment that keeps the line alive
        event_id = fields.get("id")
        return Frame(fields.get("event", "message"), json.loads(fields["data"]), int(event_id) if event_id else None)
