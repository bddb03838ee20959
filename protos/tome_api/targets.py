"""gRPC targets: the hosts that they name, and whether a host is this machine."""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass
from urllib.parse import unquote

# The port that gRPC takes for a target without one.
_DEFAULT_PORT = "443"


@dataclass(frozen=True, slots=True)
class Address:
    """Where a server listens."""

    host: str
    """A name or an IP address, without brackets."""
    port: str


def addresses(target: str) -> tuple[Address, ...]:
    """Returns the addresses that a target names: several for a list, none for a local socket's path."""
    scheme, _, rest = target.partition(":")
    if scheme in ("unix", "unix-abstract", "vsock"):
        return ()
    if scheme not in ("dns", "ipv4", "ipv6"):
        return (_address(target),)
    if rest.startswith("//"):  # the authority, a DNS server, comes next; it is usually empty
        rest = rest[2:].partition("/")[2]
    rest = unquote(rest.removeprefix("/"))
    return tuple(map(_address, [rest] if scheme == "dns" else rest.split(",")))


def is_this_machine(host: str) -> bool:
    """Whether a host is a loopback address, or a name that always stands for one (RFC 6761).

    The unspecified addresses, 0.0.0.0 and ::, connect to this machine too.
    """
    name = host.rstrip(".").lower()
    if name == "localhost" or name.endswith(".localhost"):
        return True
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return False
    if isinstance(address, ipaddress.IPv6Address) and address.ipv4_mapped:
        address = address.ipv4_mapped
    return address.is_loopback or address.is_unspecified


def _address(text: str) -> Address:
    if text.startswith("["):
        host, _, port = text[1:].partition("]")
        port = port.removeprefix(":")
    elif text.count(":") == 1:
        host, _, port = text.partition(":")
    else:  # there is no port: an IPv6 address if there are several colons
        host, port = text, ""
    return Address(host, port or _DEFAULT_PORT)
