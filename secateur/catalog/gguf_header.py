"""The header of a GGUF file, read within bounds: metadata, and the names and sizes of tensors.

The libraries that load GGUF files believe the counts in the header, and a count that is too large keeps them busy for
ever. They may open only files whose header this module has read. Format: GGUF specification, version 2 and 3
(ggml, ``docs/gguf.md``).
"""

import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

MAGIC = b"GGUF"
VERSIONS = (2, 3)
MOST_KEYS, MOST_TENSORS, MOST_ELEMENTS, MOST_DIMENSIONS = 2**14, 2**16, 2**22, 4
"""Bounds on metadata keys, tensors, elements of all arrays, and dimensions of a tensor.

The largest published vocabularies make an array of tokens, scores, kinds and merges of about two million elements.
"""
LONGEST_NAME, LONGEST_TEXT = 2**10, 2**24
"""Largest number of bytes in the name of a key or tensor, and in any other text."""
SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
"""Kinds of metadata values, as :mod:`struct` formats them."""
TEXT, ARRAY = 8, 9
KEPT = 2**16
"""Arrays with more numbers than this are skipped; of arrays of texts, only the length is kept."""


@dataclass(frozen=True)
class Header:
    """The metadata of a GGUF file, and the number of elements of each tensor."""

    values: Mapping[str, Any]
    """Scalars, texts and arrays of numbers; :class:`Skipped` stands for the other arrays."""
    tensors: Mapping[str, int]


@dataclass(frozen=True)
class Skipped:
    """An array of ``length`` elements that was not kept."""

    length: int


def read_header(path: Path, blocks: Mapping[int, tuple[int, int]]) -> Header:
    """Read the header of a GGUF file, and check that all that it declares can be in the file.

    ``blocks`` has, for each kind of tensor, the number of elements and of bytes in a block.

    Raises:
        OSError: The file cannot be read.
        ValueError: The file is no GGUF file, or declares more than it holds or than is allowed; the message says what.
    """
    if not path.is_file():  # reading a pipe might never end
        raise ValueError("it is no regular file")
    with path.open("rb") as file:
        return _Reader(file, path.stat().st_size, blocks).header()


class _Reader:
    def __init__(self, file: IO[bytes], size: int, blocks: Mapping[int, tuple[int, int]]) -> None:
        self._file = file
        self._blocks = blocks
        self._size = size
        self._order = "<"
        self._elements = 0

    def header(self) -> Header:
        if self._take(4) != MAGIC:
            raise ValueError("it does not begin with 'GGUF'")
        version = self._number("I")
        if version & 0xFFFF == 0:  # a file of the other byte order
            self._order, version = ">", int.from_bytes(version.to_bytes(4, "little"), "big")
        if version not in VERSIONS:
            raise ValueError(f"its version is {version}; allowed: {', '.join(map(str, VERSIONS))}")
        tensors = self._count("tensors", MOST_TENSORS)
        values: dict[str, Any] = {}
        for _ in range(self._count("metadata keys", MOST_KEYS)):
            key = self._text(LONGEST_NAME)
            if key in values:
                raise ValueError(f"its metadata has the key '{key[:100]}' twice")
            values[key] = self._value(self._number("I"))
        return Header(values, self._tensors(tensors))

    def _tensors(self, count: int) -> dict[str, int]:
        found: dict[str, int] = {}
        ends = []
        for _ in range(count):
            name = self._text(LONGEST_NAME)
            if name in found:
                raise ValueError(f"it has the tensor '{name[:100]}' twice")
            dimensions = [self._number("Q") for _ in range(self._count("dimensions", MOST_DIMENSIONS, "I"))]
            elements, kind, offset = math.prod(dimensions), self._number("I"), self._number("Q")
            if kind not in self._blocks:
                raise ValueError(f"its tensor '{name[:100]}' is of the unknown kind {kind}")
            block, size = self._blocks[kind]
            ends.append((name, offset + elements * size // block))
            found[name] = elements
        begin = self._file.tell()
        for name, end in ends:
            if begin + end > self._size:
                raise ValueError(f"its tensor '{name[:100]}' ends behind the end of the file")
        return found

    def _value(self, kind: int) -> Any:
        if kind in SCALARS:
            return self._number(SCALARS[kind])
        if kind == TEXT:
            return self._text(LONGEST_TEXT)
        if kind != ARRAY:
            raise ValueError(f"its metadata has a value of the unknown kind {kind}")
        inner, length = self._number("I"), self._number("Q")
        self._elements += length
        if self._elements > MOST_ELEMENTS:
            raise ValueError(f"the arrays of its metadata have more than {MOST_ELEMENTS:,} elements")
        if inner == TEXT:
            for _ in range(length):
                self._skip(self._number("Q"))
            return Skipped(length)
        if inner not in SCALARS:
            raise ValueError(f"its metadata has an array of values of kind {inner}")
        form = SCALARS[inner]
        if length > KEPT:
            self._skip(length * struct.calcsize(f"={form}"))
            return Skipped(length)
        return list(struct.unpack(f"{self._order}{length}{form}", self._take(length * struct.calcsize(f"={form}"))))

    def _count(self, what: str, most: int, form: str = "Q") -> int:
        count: int = self._number(form)
        if count > most:
            raise ValueError(f"it declares {count:,} {what}; allowed: {most:,}")
        return count

    def _number(self, form: str) -> Any:
        (number,) = struct.unpack(self._order + form, self._take(struct.calcsize(f"={form}")))
        return number

    def _text(self, longest: int) -> str:
        length = self._number("Q")
        if length > longest:
            raise ValueError(f"it declares a text of {length:,} bytes; allowed here: {longest:,}")
        return self._take(length).decode()

    def _take(self, size: int) -> bytes:
        found = self._file.read(size)
        if len(found) < size:
            raise ValueError("it ends within its header")
        return found

    def _skip(self, size: int) -> None:
        if self._file.tell() + size > self._size:
            raise ValueError("it ends within its header")
        self._file.seek(size, 1)
