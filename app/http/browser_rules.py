"""What every response tells a browser, should one ever show it (OWASP's HTTP headers for REST)."""

from collections.abc import Mapping

from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

ALWAYS = {"X-Content-Type-Options": "nosniff", "X-Frame-Options": "DENY", "Referrer-Policy": "no-referrer"}
NOTHING = "default-src 'none'; frame-ancestors 'none'"
DOCS = "frame-ancestors 'none'"
"""FastAPI's pages for people have scripts of their own and of a CDN."""
DASHBOARD = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data: blob:; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
ONE_YEAR = "max-age=31536000"


class BrowserRules:
    """ASGI middleware: nothing is sniffed, framed, run or, below ``private``, stored, unless a route says otherwise; ``pages`` have a Content-Security-Policy of their own.

    ``Strict-Transport-Security`` comes with what was asked for by https, as RFC 6797 (section 7.2) wants it: behind a
    proxy that is so where uvicorn trusts its ``X-Forwarded-Proto`` (``FORWARDED_ALLOW_IPS``).
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
