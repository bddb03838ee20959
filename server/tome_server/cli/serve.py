"""`tome-server serve`: serve models until SIGTERM. And how another program starts it and learns when it is ready."""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, NoReturn

from tome_server.cli.flags import Commands, add_model_flags
from tome_server.signals import leave, stopping_at_once

FREE_PORTS = ("--listen", "127.0.0.1:0", "--metrics", "127.0.0.1:0")
"""Flags that have a server listen on ports of this machine that nothing else uses; it says which."""


def add_to(commands: Commands) -> None:
    """Add the command."""
    serve = commands.add_parser(
        "serve",
        usage="%(prog)s [options]",
        help="serve models until SIGTERM",
        description="Serve models until SIGTERM: the bundled one unless flags name others. A line of JSON on standard "
        "output says when the server is ready, and at which addresses. Settings without a flag are set in --config's "
        "file, see tome-server settings.",
    )
    add_model_flags(serve)
    serve.add_argument("--listen", metavar="HOST:PORT", help="gRPC address (default: 0.0.0.0:8500; port 0: a free one)")
    serve.add_argument("--metrics", metavar="HOST:PORT", help="Prometheus address (default: 0.0.0.0:8501), or off")
    serve.add_argument("--max-batch", type=int, metavar="N", help="images in a batch (default: 8)")
    serve.add_argument("--max-delay", metavar="TIME", help="wait for batch-mates on an idle device (default: 0ms)")
    serve.add_argument("--max-pending", type=int, metavar="N", help="requests held at once (default: 256)")
    serve.add_argument("--policy", metavar="NAME", help="price (default), fixed:R, max_accuracy, max_batch or slackfit")
    serve.add_argument("--profiles", type=Path, metavar="DIR", help="where measured latencies are kept")
    serve.add_argument("--profile-time", metavar="TIME", help="how long to measure them if none fit (default: 5s)")
    serve.add_argument("--drain-timeout", metavar="TIME", help="time for calls in flight after SIGTERM (default: 30s)")
    serve.add_argument(
        "--hung-device-timeout", metavar="TIME", help="end the server once its device hangs so long (default: 20s)"
    )
    serve.add_argument(
        "--log-level", default="info", choices=["debug", "info", "warning", "error"], help="info (default)"
    )
    serve.add_argument("--log-format", choices=["auto", "json", "text"], help="auto (default): text at a terminal")
    serve.set_defaults(run=run)


def run(args: argparse.Namespace) -> NoReturn:
    """Serve, and exit."""
    with stopping_at_once():  # before the imports, which take seconds
        import asyncio

        from tome_server.config.flags import configured

        config = configured(args.config, vars(args))
        # Without this, the C core of gRPC writes lines about closed connections and failed handshakes into the log.
        os.environ.setdefault("GRPC_VERBOSITY", "NONE")
        from tome_server.app import serve
        from tome_server.observability import logs

        logs.configure(args.log_level, config.log_format)
        leave(asyncio.run(serve(config)))


def start(*flags: str, **options: Any) -> "subprocess.Popen[str]":
    """Start a server in a process of its own; `when_ready` waits for it.

    Args:
        *flags: Of the command.
        **options: Of `subprocess.Popen`, such as `stderr`, where the server logs.
    """
    command = [sys.executable, "-m", "tome_server", "serve", *flags]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, **options)


def when_ready(process: "subprocess.Popen[str]") -> dict[str, Any] | None:
    """Wait until a server that `start` started is ready.

    Returns:
        What its line of JSON says: the addresses `grpc` and, unless it is off, `metrics`, and the `seconds` that the
        start took. None if the server has ended, or closed its standard output, without being ready.
    """
    assert process.stdout is not None
    line = process.stdout.readline()
    ready: dict[str, Any] | None = json.loads(line)["ready"] if line else None
    return ready
