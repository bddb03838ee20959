"""Advice for the command line when a server can't be reached.

The words in which gRPC explains a failure change from release to release, so they are not parsed. Instead, the target
is resolved and connected to once more.
"""

from __future__ import annotations

import ipaddress
import socket
import ssl

from tome_api.targets import Address, addresses
from tome_client.proxy import proxy_of

# Seconds for a connection, and again for a TLS handshake on it.
_TIMEOUT = 2.0


def advice(target: str, *, tls: bool) -> str | None:
    """Returns advice after a call failed; None if a server of the right kind can be connected to.

    Args:
        target: The server that was called.
        tls: Whether it was called over TLS.
    """
    if proxy_of(target) is not None:  # the error names the proxy, which also resolves the name
        return None
    named = addresses(target)
    if not all(map(_resolves, named)):
        return "--target names the server, as HOST:PORT"
    for address in named:
        try:
            connection = socket.create_connection((address.host, address.port), _TIMEOUT)
        except OSError:
            continue
        with connection:
            spoken = _speaks_tls(connection)
        if tls and spoken is False:
            return "the server there speaks plain text: leave out --tls and --ca"
        if spoken and not tls:
            return "the server there speaks TLS: add --tls"
        return None
    return "is a server running there? tome-server serve starts one, --target names another" if named else None


def _resolves(address: Address) -> bool:
    # The system takes ports modulo 65536 and reads 127.1 as an address; gRPC does neither.
    if address.port.isdecimal() and int(address.port) > 65535:
        return False
    try:
        if address.host.replace(".", "").isdecimal():
            ipaddress.ip_address(address.host)
        socket.getaddrinfo(address.host, address.port, type=socket.SOCK_STREAM)
    except (OSError, ValueError):  # a ValueError also for a name with a part that is too long
        return False
    return True


def _speaks_tls(connection: socket.socket) -> bool | None:
    """Whether a server answers a TLS handshake, without checking certificates; None if it gives no answer."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    context.set_alpn_protocols(["h2"])
    try:
        with context.wrap_socket(connection):
            return True
    except ssl.SSLEOFError:
        return None
    except ssl.SSLError as error:
        # An alert is a refusal in TLS, for example of a client without a certificate.
        return "ALERT" in (error.reason or "")
    except OSError:
        return None
