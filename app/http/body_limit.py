"""A limit on request bodies: the service reads no body that is larger than the operator allows."""

from collections.abc import Mapping

from fastapi import Request
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from app.http.problem import Problem, respond
from secateur.contract.errors import ErrorCode


class BodyLimit:
    """ASGI middleware that answers 413 (RFC 9110, section 15.5.14) to a body of more than ``largest`` bytes.

    It checks the ``Content-Length`` before it reads the body; without that header, it answers as soon as more than
    ``largest`` bytes have arrived. ``at`` has the limits of paths with a limit of their own.
    """

    def __init__(self, app: ASGIApp, largest: int, at: Mapping[str, int]) -> None:
        self.app = app
        self.largest = largest
        self.at = at

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        largest = self.at.get(scope["path"], self.largest)
        too_large = f"The body is larger than {largest} bytes."
        if int(Headers(scope=scope).get("content-length", 0)) > largest:
            return await respond(Request(scope), Problem(413, ErrorCode.BODY_TOO_LARGE, too_large))(
                scope, receive, send
            )
        received = 0

        async def bounded() -> Message:
            nonlocal received
            message = await receive()
            received += len(message.get("body", b""))
            if received > largest:
                raise Problem(413, ErrorCode.BODY_TOO_LARGE, too_large)
            return message

        return await self.app(scope, bounded, send)
