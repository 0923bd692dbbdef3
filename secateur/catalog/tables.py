"""Tables of named entries: structures, methods and the components of methods."""

from typing import Protocol, TypeVar


class Named(Protocol):
    """An entry of a table."""

    @property
    def name(self) -> str: ...


Entry = TypeVar("Entry", bound=Named)


def by_name(*entries: Entry) -> dict[str, Entry]:
    """Return the entries by their names, in the order of the arguments."""
    return {entry.name: entry for entry in entries}
