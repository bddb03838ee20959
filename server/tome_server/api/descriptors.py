"""How many files and sockets the process may have open, and how many of them connections may take."""

import resource
from dataclasses import dataclass

# Kept back for files, the device's process and libraries, and for the 256 HTTP connections that the event loop accepts
# in one turn before it can refuse any.
OWN = 384
# More than any server needs; some containers allow a thousand times as many.
MOST = 2**20


@dataclass(frozen=True)
class ConnectionBounds:
    """Connections that may be open at once, so that descriptors are left for the server itself."""

    grpc: int
    http: int
    http_per_address: int


def raise_limit() -> int:
    """Allow this process as many open files as it may allow itself; return how many that is."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = MOST if hard == resource.RLIM_INFINITY else min(hard, MOST)
    if soft != resource.RLIM_INFINITY and soft < most:
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
        soft = most
    return MOST if soft == resource.RLIM_INFINITY else soft


def connection_bounds(limit: int, grpc: int | None, http: int, http_per_address: int) -> ConnectionBounds:
    """Return the bounds for `limit` open files: those that are set, or less where these would take what is kept back.

    `grpc` is None for as many as are left.
    """
    room = limit - min(OWN, limit // 2)
    http = min(http, room // 2)
    left = room - http
    # Half of them at most, where the bound of all was lowered: else one address could keep metrics and probes out.
    return ConnectionBounds(left if grpc is None else min(grpc, left), http, min(http_per_address, max(1, http // 2)))
