"""Where webhooks may go: to public addresses, and to the networks that the operator allows."""

import ipaddress
from collections.abc import Collection
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network

Address = IPv4Address | IPv6Address
Network = IPv4Network | IPv6Network

GLOBAL_UNICAST = IPv6Network("2000::/3")
"""All that IANA has given out for it; the rest of IPv6 is special or reserved."""
PROTOCOL_ASSIGNMENTS = IPv4Network("192.0.0.0/24")
"""RFC 6890; older releases of Python call parts of it global."""
NAT64 = IPv6Network("64:ff9b::/96")
"""The well-known prefix (RFC 6052); the last 32 bits are an IPv4 address."""


def is_allowed(address: Address, networks: Collection[Network]) -> bool:
    """Whether webhooks may go there: to one of ``networks``, or to any public unicast address.

    Public is what the IANA registries of special-purpose addresses (RFC 6890), in :mod:`ipaddress`, call global.
    """
    address = _destination(address)
    if any(address in network for network in networks):
        return True
    if isinstance(address, IPv6Address):
        return address in GLOBAL_UNICAST and address.is_global
    return address.is_global and not address.is_multicast and address not in PROTOCOL_ASSIGNMENTS


def is_allowed_host(host: str, networks: Collection[Network]) -> bool:
    """The same for the host of a URL, as far as it is known without a look-up: other names than ``localhost`` pass."""
    name = host.strip("[]").rstrip(".").lower()
    if name == "localhost" or name.endswith(".localhost"):
        name = "127.0.0.1"
    try:
        return is_allowed(ipaddress.ip_address(name), networks)
    except ValueError:
        return True


def _destination(address: Address) -> Address:
    """The IPv4 address that an IPv6 one leads to, if it does: mapped (RFC 4291), 6to4 (RFC 3056) and NAT64."""
    if isinstance(address, IPv4Address):
        return address
    if address in NAT64:
        return IPv4Address(address.packed[-4:])
    return address.ipv4_mapped or address.sixtofour or address
