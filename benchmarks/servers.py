"""Servers that benchmarks measure, each in a process of its own on free ports of this machine."""

import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.samples import Sample

from tome_server.cli.serve import FREE_PORTS, start, when_ready

# Seconds for a server to stop, or to answer.
TIMEOUT = 600.0
# urllib's own opener would ask a proxy of the environment for what is on this machine.
DIRECT = urllib.request.build_opener(urllib.request.ProxyHandler({}))


@dataclass(frozen=True)
class Server:
    """A server that is ready."""

    process: "subprocess.Popen[str]"
    target: str
    """Its gRPC address."""
    metrics: str
    """The URL of its metrics; empty if they are off."""
    seconds: float
    """From the command to the line that says ready."""

    def samples(self) -> list[Sample]:
        """Read the server's metrics."""
        with DIRECT.open(self.metrics, timeout=TIMEOUT) as response:
            families = text_string_to_metric_families(response.read().decode())
        return [sample for family in families for sample in family.samples]


@contextmanager
def tome_server(*flags: str) -> Iterator[Server]:
    """Run `tome-server serve` with these flags while the block lasts. Exits if it does not start."""
    began = time.perf_counter()
    with ready(start(*FREE_PORTS, "--log-level", "warning", *flags), began) as server:
        yield server


@contextmanager
def python_server(module: str, *flags: str) -> Iterator[Server]:
    """Run a server that is a module of its own, and says ready as `tome-server serve` does."""
    began = time.perf_counter()
    command = [sys.executable, "-m", module, *flags]
    with ready(subprocess.Popen(command, stdout=subprocess.PIPE, text=True), began) as server:
        yield server


@contextmanager
def ready(process: "subprocess.Popen[str]", began: float) -> Iterator[Server]:
    """Wait until the server of a process is ready; it is stopped (SIGTERM) when the block ends."""
    try:
        said: dict[str, Any] | None = when_ready(process)
        if said is None:
            sys.exit("a server did not start")
        yield Server(process, said["grpc"], said.get("metrics", ""), time.perf_counter() - began)
    finally:
        process.terminate()
        process.wait(TIMEOUT)
        assert process.stdout is not None
        process.stdout.close()
