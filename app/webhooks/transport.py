"""An httpx2 transport that connects only to allowed addresses."""

import asyncio
import ipaddress
import socket
from collections.abc import Collection
from concurrent.futures import ThreadPoolExecutor

import httpx2

from app.webhooks.addresses import Network, is_allowed

LOOKUPS = ThreadPoolExecutor(32, "webhook-lookup")
"""Threads for DNS lookups; a name server that never answers blocks no other lookup. The event loop's own thread pool is
not used, because the loop waits for it at its end."""


class Forbidden(httpx2.TransportError):
    """The transport refuses the URL, because no webhook may be sent to it."""


class GuardedTransport(httpx2.AsyncHTTPTransport):
    """A transport that looks a name up once and connects only to the allowed addresses that the lookup returned.

    The DNS answer therefore cannot change between the check and the connection. TLS and ``Host`` use the name. No
    connection is reused, because one address may belong to many names.
    """

    def __init__(self, networks: Collection[Network]) -> None:
        super().__init__(limits=httpx2.Limits(max_keepalive_connections=0))
        self.networks = networks

    async def handle_async_request(self, request: httpx2.Request) -> httpx2.Response:
        """Send the request to the first allowed address of its host that accepts the connection.

        Raises:
            Forbidden: the URL has a user name or a password, or its host has no allowed address.
            httpx2.TransportError: the host has no address, or the base class raises this error while sending.
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
    """Return a copy of the request to ``host`` that connects to ``address``; its headers already contain the host
    name."""
    return httpx2.Request(
        request.method,
        request.url.copy_with(host=address),
        headers=request.headers,
        stream=request.stream,
        extensions={**request.extensions, "sni_hostname": host},
    )
