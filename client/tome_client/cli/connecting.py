"""The connection that a command line describes, and what to do when it fails."""

from __future__ import annotations

import argparse

import grpc

from tome_client.client import Client
from tome_client.connection import connection
from tome_client.errors import TomeError
from tome_client.reachability import advice

# The codes of calls that reach no server. gRPC gives UNKNOWN for a target that it can't parse.
_UNREACHED = (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED, grpc.StatusCode.UNKNOWN)


def connect(args: argparse.Namespace) -> Client:
    """Returns a client of the server that the arguments name."""
    return Client(args.target, **connection(args))


def hint(error: Exception, args: argparse.Namespace) -> str:
    """Returns what may help after an error, where it may mean that no server was reached."""
    # A server that refuses a request gives a reason. Then it was reached, and there is nothing to advise.
    if not isinstance(error, TomeError) or error.code not in _UNREACHED or error.reason is not None:
        return ""
    advised = advice(args.target, tls=bool(args.tls or args.ca or args.certificate))
    return f"; {advised}" if advised else ""
