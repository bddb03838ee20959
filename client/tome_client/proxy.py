"""Which HTTP proxy a connection goes through: gRPC's rules, except that none leads to this machine."""

from __future__ import annotations

import ipaddress
import os
from dataclasses import dataclass
from typing import Final
from urllib.parse import urlsplit

from tome_api.targets import addresses, is_this_machine

# In gRPC's order: the first that is set decides, even if it is empty, which means no proxy.
_PROXIES: Final = ("grpc_proxy", "https_proxy", "http_proxy")
_EXCEPTIONS: Final = ("no_grpc_proxy", "no_proxy")


@dataclass(frozen=True, slots=True)
class Proxy:
    """A proxy that the environment names."""

    variable: str
    """The environment variable that names it."""
    address: str
    """Its host and port, without a user and password."""
    way_out: str
    """How to connect without it."""


def is_direct(target: str) -> bool:
    """Whether a target must be connected to directly, whatever the environment says.

    It must if it is this machine, since the proxy's own loopback address is another machine's, and if it is a list of
    addresses, since a proxy can connect to one only.
    """
    named = addresses(target)
    return len(named) != 1 or is_this_machine(named[0].host)


def proxy_of(target: str) -> Proxy | None:
    """Returns the proxy through which gRPC connects to a target; None if it connects directly."""
    variable = next((name for name in _PROXIES if name in os.environ), None)
    if variable is None or is_direct(target):
        return None
    (address,) = addresses(target)
    exceptions = next((name for name in _EXCEPTIONS if name in os.environ), _EXCEPTIONS[-1])
    if any(_matches(address.host, one) for one in os.environ.get(exceptions, "").split(",")):
        return None
    try:
        url = urlsplit(os.environ[variable])
    except ValueError:
        return None
    # gRPC supports no other kind of proxy. It logs that, and connects directly.
    if url.scheme != "http" or not url.netloc:
        return None
    return Proxy(variable, url.netloc.rpartition("@")[2], f"add {address.host} to {exceptions}")


def _matches(host: str, exception: str) -> bool:
    """Whether an entry of no_proxy is the end of a host's name, its address, or a network that contains it."""
    exception = exception.strip().lower()
    if exception and host.lower().endswith(exception):
        return True
    try:
        return ipaddress.ip_address(host) in ipaddress.ip_network(exception, strict=False)
    except ValueError:
        return False
