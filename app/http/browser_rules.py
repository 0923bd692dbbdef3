"""Response headers that restrict what browsers do with a response (OWASP's HTTP headers for REST)."""

from collections.abc import Mapping

from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

ALWAYS = {"X-Content-Type-Options": "nosniff", "X-Frame-Options": "DENY", "Referrer-Policy": "no-referrer"}
NOTHING = "default-src 'none'; frame-ancestors 'none'"
DOCS = "frame-ancestors 'none'"
"""Policy of FastAPI's documentation pages, which load their own scripts and scripts from a CDN."""
DASHBOARD = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data: blob:; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
ONE_YEAR = "max-age=31536000"


class BrowserRules:
    """ASGI middleware that forbids browsers to sniff, frame or run responses and to store responses below ``private``.

    A route may override each header. The paths in ``pages`` have their own Content-Security-Policy.

    ``Strict-Transport-Security`` is sent only in answers to requests by https, as RFC 6797 (section 7.2) requires.
    Behind a proxy, uvicorn must trust the proxy's ``X-Forwarded-Proto`` for this (``FORWARDED_ALLOW_IPS``).
    """

    def __init__(self, app: ASGIApp, private: str, pages: Mapping[str, str]) -> None:
        self.app = app
        self.private = private
        self.pages = pages

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        rules = {**ALWAYS, "Content-Security-Policy": self.pages.get(scope["path"], NOTHING)}
        if scope["path"].startswith(self.private):
            rules["Cache-Control"] = "no-store"
        if scope["scheme"] == "https":
            rules["Strict-Transport-Security"] = ONE_YEAR

        async def ruled(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in rules.items():
                    headers.setdefault(name, value)
            await send(message)

        return await self.app(scope, receive, ruled)
