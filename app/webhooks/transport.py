"""An httpx2 transport that connects to allowed addresses only."""

import asyncio
import ipaddress
import socket
from collections.abc import Collection
from concurrent.futures import ThreadPoolExecutor

import httpx2

from app.webhooks.addresses import Network, is_allowed

LOOKUPS = ThreadPoolExecutor(32, "webhook-lookup")
"""Not the event loop's own few, which it waits for at its end: a name server that never answers holds up nobody else."""


class Forbidden(httpx2.TransportError):
    """A URL that no webhook is sent to."""


class GuardedTransport(httpx2.AsyncHTTPTransport):
    """Looks a name up once, and connects to just what was found and allowed: DNS cannot change its mind in between.

    TLS and ``Host`` are the name's. No connection is used twice: one address may belong to many names.
    """

    def __init__(self, networks: Collection[Network]) -> None:
        super().__init__(limits=httpx2.Limits(max_keepalive_connections=0))
        self.networks = networks

    async def handle_async_request(self, request: httpx2.Request) -> httpx2.Response:
        """As the base class, at the first allowed address that can be connected to.

        Raises:
            Forbidden: the URL has a user name, or its host no allowed address.
            httpx2.TransportError: as the base class.
        """
        if request.url.userinfo:
            raise Forbidden("a webhook's URL has no user name and no password")
        host = request.url.raw_host.decode("ascii")
        *others, last = await self._addresses(host)
        for address in others:
            try:
                return await super().handle_async_request(_pinned(request, host, address))
            except (httpx2.ConnectError, httpx2.ConnectTimeout):
                continue
        return await super().handle_async_request(_pinned(request, host, last))

    async def _addresses(self, host: str) -> list[str]:
        loop = asyncio.get_running_loop()
        try:
            found = await loop.run_in_executor(LOOKUPS, lambda: socket.getaddrinfo(host, None, type=socket.SOCK_STREAM))
        except (OSError, UnicodeError) as error:
            raise httpx2.ConnectError(f"'{host}' has no address: {error}") from error
        addresses = [str(address[0]) for *_, address in found]
        allowed = [address for address in addresses if is_allowed(ipaddress.ip_address(address), self.networks)]
        if not allowed:
            where = ", ".join(addresses)
            raise Forbidden(f"'{host}' is at {where}: neither public nor in SECATEUR_WEBHOOK_NETWORKS")
        return allowed


def _pinned(request: httpx2.Request, host: str, address: str) -> httpx2.Request:
    """The request to ``host``, whose name its headers hold already, made to ``address``."""
    return httpx2.Request(
        request.method,
        request.url.copy_with(host=address),
        headers=request.headers,
        stream=request.stream,
        extensions={**request.extensions, "sni_hostname": host},
    )
