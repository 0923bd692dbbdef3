"""The addresses to which webhooks may be sent: public addresses and the networks that the operator allows."""

import ipaddress
from collections.abc import Collection
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network

Address = IPv4Address | IPv6Address
Network = IPv4Network | IPv6Network

GLOBAL_UNICAST = IPv6Network("2000::/3")
"""The IPv6 range that IANA has assigned to global unicast; the rest of IPv6 is special or reserved."""
PROTOCOL_ASSIGNMENTS = IPv4Network("192.0.0.0/24")
"""The IETF protocol assignments (RFC 6890); older Python releases classify parts of this network as global."""
NAT64 = IPv6Network("64:ff9b::/96")
"""The well-known NAT64 prefix (RFC 6052); the last 32 bits of an address are an IPv4 address."""


def is_allowed(address: Address, networks: Collection[Network]) -> bool:
    """Return whether webhooks may be sent to ``address``: an address in ``networks`` or a public unicast address.

    An address is public if the IANA registries of special-purpose addresses (RFC 6890), as implemented in
    :mod:`ipaddress`, call it global.
    """
    address = _destination(address)
    if any(address in network for network in networks):
        return True
    if isinstance(address, IPv6Address):
        return address in GLOBAL_UNICAST and address.is_global
    return address.is_global and not address.is_multicast and address not in PROTOCOL_ASSIGNMENTS


def is_allowed_host(host: str, networks: Collection[Network]) -> bool:
    """Return whether webhooks may be sent to the host of a URL, as far as this is known without a DNS lookup.

    Names other than ``localhost`` and its subdomains pass.
    """
    name = host.strip("[]").rstrip(".").lower()
    if name == "localhost" or name.endswith(".localhost"):
        name = "127.0.0.1"
    try:
        return is_allowed(ipaddress.ip_address(name), networks)
    except ValueError:
        return True


def _destination(address: Address) -> Address:
    """Return the IPv4 address that an IPv6 address leads to, else ``address``.

    The IPv6 forms are mapped (RFC 4291), 6to4 (RFC 3056) and NAT64 addresses.
    """
    if isinstance(address, IPv4Address):
        return address
    if address in NAT64:
        return IPv4Address(address.packed[-4:])
    return address.ipv4_mapped or address.sixtofour or address
