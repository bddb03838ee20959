"""`tome-client wait`."""

from __future__ import annotations

import argparse
import sys
import time

import grpc

from tome_api.durations import NO_DEADLINE, duration_text
from tome_api.nearest import meant
from tome_api.parser import Parser
from tome_client.arguments import Commands, budget, error_text, warn
from tome_client.cli.connecting import hint
from tome_client.cli.progress import ProgressLine
from tome_client.client import Client
from tome_client.connection import Connection, connection
from tome_client.errors import TomeError

# Seconds between two questions, and for one answer.
_PAUSE = 0.25
_ANSWER = 5.0

# What no waiting changes: a wrong token, or a server of another kind.
_FINAL = (grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.PERMISSION_DENIED, grpc.StatusCode.UNIMPLEMENTED)

_EXAMPLES = """\
examples:
  tome-client wait && tome-client predict shirt.png
  tome-client wait --model fashion --timeout 5m --target vision:8500      as an init container, for instance

Exits with 0 once the server is ready, and with 1 after the time-out, or at once if it refuses the token.
"""


def add_to(commands: Commands, parent: Parser) -> None:
    """Adds the command."""
    command = commands.add_parser(
        "wait",
        parents=[parent],
        usage="%(prog)s [options]",
        help="wait until a server is ready",
        description="Waits until the server answers and its models are loaded, or the one that --model names.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    command.set_defaults(run=_run)
    command.add_argument(
        "--timeout",
        type=budget,
        default=60.0,
        metavar="TIME",
        help=f"longest to wait, such as 90s or 5m, or {NO_DEADLINE} (default: 60s)",
    )
    command.add_argument("--model", metavar="NAME", help="wait for this model only (default: every model)")


def _run(args: argparse.Namespace) -> int:
    """Asks until the server is ready or the time is over."""
    connected = connection(args)
    # A server that loads or drains lists its models too. Its health says whether it takes requests.
    connected["health_checks"] = True
    until = time.monotonic() + args.timeout
    missing: str | TomeError = "no answer yet"

    def waiting() -> str:
        return f"waiting for {args.target}: {error_text(missing) if isinstance(missing, TomeError) else missing}"

    with ProgressLine(waiting, shown=bool(sys.stderr and sys.stderr.isatty())):
        while True:
            try:
                missing = _missing(args, connected, timeout=min(_ANSWER, max(until - time.monotonic(), _PAUSE)))
            except TomeError as error:
                if error.code in _FINAL:
                    raise
                missing = error
            if not missing or time.monotonic() + _PAUSE >= until:
                break
            time.sleep(_PAUSE)
    if not missing:
        return 0
    why = f"{error_text(missing)}{hint(missing, args)}" if isinstance(missing, TomeError) else missing
    warn(f"{args.target} was not ready within {duration_text(args.timeout)}: {why}")
    return 1


def _missing(args: argparse.Namespace, connected: Connection, timeout: float) -> str:
    """Returns what is not ready yet; an empty text if all is.

    Each question has a connection of its own, since gRPC pauses longer and longer before it tries a lost one again.

    Raises:
        TomeError: The server gave no answer.
    """
    with Client(args.target, **connected, retries=False) as client:
        models = client.models(timeout=timeout)
    if args.model is None:
        loading = [one.name for one in models if not one.ready]
        return f"{', '.join(loading)} {'is' if len(loading) == 1 else 'are'} still loading" if loading else ""
    named = [one for one in models if one.name == args.model]
    if not named:
        names = [one.name for one in models]
        return f"it has no model {args.model!r}, but {', '.join(names)}{meant(args.model, names)}"
    return "" if named[0].ready else f"{args.model} is still loading"
