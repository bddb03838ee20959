"""`make stack`: a server and the Prometheus that watches it come and go together."""

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.deploy.prometheus import INSTALL, Prometheus, free_port, until
from tests.http_proxy import HttpProxy, running_proxy

STACK = Path(__file__).parents[2] / "deploy/stack.py"


@pytest.fixture
def proxy() -> Iterator[HttpProxy]:
    with running_proxy() as running:
        yield running


@pytest.fixture
def stack(cache: Path, proxy: HttpProxy) -> Iterator[Callable[..., Any]]:
    """Return a function that starts the stack on free ports, in an environment that asks for a proxy."""
    if shutil.which("prometheus") is None:
        pytest.skip(f"needs Prometheus: {INSTALL}")
    started: list[subprocess.Popen[str]] = []

    def start(*flags: str) -> "subprocess.Popen[str]":
        command = [sys.executable, STACK, "--listen", "127.0.0.1:0", "--metrics", "127.0.0.1:0"]
        command += ["--prometheus", f"127.0.0.1:{free_port()}", *flags]
        started.append(
            subprocess.Popen(
                command, env=proxy.environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
            )
        )
        return started[-1]

    yield start
    for process in started:
        if process.poll() is None:
            process.terminate()
        process.communicate(timeout=90)


def children(process: "subprocess.Popen[str]") -> list[int]:
    """What `process` has started, by Linux's account."""
    return [int(child) for child in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()]


def alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    return True


def test_both_run_until_ctrl_c_ends_both(stack: Callable[..., Any], proxy: HttpProxy) -> None:
    running = stack("--", "--profile-time", "2s", "--threads", "1")
    said = ""
    while "Ctrl-C" not in said:
        line = running.stdout.readline()
        assert line, running.stderr.read()
        said += line
    address = re.search(r"Prometheus +(http://\S+)/targets", said)
    assert address is not None
    prometheus = Prometheus(address[1])
    until(lambda: prometheus.query('up{job="tome-serving"} == 1'), "the server is watched")
    assert len(prometheus.get("rules")["groups"]) >= 4
    server_and_prometheus = children(running)
    assert len(server_and_prometheus) == 2
    running.send_signal(signal.SIGINT)
    out, _ = running.communicate(timeout=90)
    assert running.returncode == 0
    assert out.splitlines()[-1] == "ended"
    assert not any(map(alive, server_and_prometheus))
    assert not proxy.asked


def test_a_server_that_cannot_start_ends_it(stack: Callable[..., Any]) -> None:
    running = stack("--", "--policy", "none-such")
    _, errors = running.communicate(timeout=90)
    assert running.returncode == 1
    assert "none-such" in errors


def test_ports_in_use_are_named_before_anything_is_started(stack: Callable[..., Any]) -> None:
    with socket.socket() as first, socket.socket() as second:
        for taken in (first, second):
            taken.bind(("127.0.0.1", 0))
            taken.listen()
        listen, prometheus = (f"127.0.0.1:{taken.getsockname()[1]}" for taken in (first, second))
        running = stack("--listen", listen, "--prometheus", prometheus)
        out, errors = running.communicate(timeout=90)
    assert running.returncode == 1
    assert errors == (
        f"stack: in use already: --listen {listen}, --prometheus {prometheus}; name other ports, as --help says\n"
    )
    assert out == ""


@pytest.mark.nightly
def test_a_prometheus_that_cannot_start_ends_the_server(stack: Callable[..., Any]) -> None:
    # An address of no machine.
    running = stack("--prometheus", "192.0.2.1:9090", "--", "--profile-time", "2s", "--threads", "1")
    _, errors = running.communicate(timeout=90)
    assert running.returncode == 1
    assert "Prometheus ended" in errors
