"""A limit on request bodies: the service holds no body in memory that is larger than the operator allows."""

from fastapi import Request
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from app.http.problem import Problem, respond
from secateur.contract.errors import ErrorCode


class BodyLimit:
    """ASGI middleware that answers 413 (RFC 9110, section 15.5.14) to a body of more than ``largest`` bytes.

    It checks the ``Content-Length`` before it reads the body; without that header, it answers as soon as more than
    ``largest`` bytes have arrived.
    """

    def __init__(self, app: ASGIApp, largest: int) -> None:
        self.app = app
        self.largest = largest

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        too_large = f"The body is larger than {self.largest} bytes."
        if int(Headers(scope=scope).get("content-length", 0)) > self.largest:
            return await respond(Request(scope), Problem(413, ErrorCode.BODY_TOO_LARGE, too_large))(
                scope, receive, send
            )
        received = 0

        async def bounded() -> Message:
            nonlocal received
            message = await receive()
            received += len(message.get("body", b""))
            if received > self.largest:
                raise Problem(413, ErrorCode.BODY_TOO_LARGE, too_large)
            return message

        return await self.app(scope, bounded, send)
