"""A small HTTP/1.1 client over keep-alive sockets. It must use little time, because it shares its machine with the server."""

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any, NamedTuple, Self


class Answer(NamedTuple):
    """A response. ``headers`` maps names in lower case to values."""

    status: int
    headers: dict[str, str]
    body: bytes


class Client:
    """One connection to one server.

    A request whose connection is cut raises :class:`asyncio.IncompleteReadError`. A request that takes longer than
    ``timeout`` seconds raises :class:`TimeoutError`.
    """

    def __init__(self, port: int, headers: dict[str, str], timeout: float = 60.0) -> None:
        self.port = port
        self.timeout = timeout
        self.headers = "".join(f"{name}: {value}\r\n" for name, value in ({"Host": "localhost"} | headers).items())

    async def __aenter__(self) -> Self:
        self.reader, self.writer = await asyncio.open_connection("127.0.0.1", self.port)
        return self

    async def __aexit__(self, *exception: object) -> None:
        self.writer.close()

    async def request(self, method: str, path: str, body: Any = None, **headers: str) -> Answer:
        """Send a request and return the answer. ``body`` is sent as JSON; ``If_None_Match="x"`` becomes a header."""
        async with asyncio.timeout(self.timeout):
            self._send(method, path, body, headers)
            status, found = await self._head()
            size = int(found.get("content-length", 0))
            return Answer(status, found, await self.reader.readexactly(size))

    async def frames(self, path: str) -> AsyncIterator[dict[str, str]]:
        """Yield the events of a stream (Server-Sent Events) until the server ends it; comments are left out.

        Raises:
            ConnectionError: the answer is not a stream.
        """
        self._send("GET", path, None, {})
        status, headers = await self._head()
        if status != 200 or headers.get("transfer-encoding") != "chunked":
            raise ConnectionError(f"no stream but {status}")
        text = b""
        while size := int(await self.reader.readuntil(b"\r\n"), 16):
            text += (await self.reader.readexactly(size + 2))[:-2]
            *whole, text = text.split(b"\n\n")
            for frame in whole:
                fields = dict(line.split(": ", 1) for line in frame.decode().split("\n") if not line.startswith(":"))
                if fields:
                    yield fields
        await self.reader.readexactly(2)

    def _send(self, method: str, path: str, body: Any, headers: dict[str, str]) -> None:
        head = f"{method} {path} HTTP/1.1\r\n{self.headers}"
        head += "".join(f"{name.replace('_', '-')}: {value}\r\n" for name, value in headers.items())
        content = b""
        if body is not None:
            content = json.dumps(body).encode()
            head += f"Content-Type: application/json\r\nContent-Length: {len(content)}\r\n"
        self.writer.write(f"{head}\r\n".encode() + content)

    async def _head(self) -> tuple[int, dict[str, str]]:
        first, *lines = (await self.reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")[:-2]
        pairs = (line.split(":", 1) for line in lines)
        return int(first.split(" ", 2)[1]), {name.lower(): value.strip() for name, value in pairs}
