"""Descriptors that run out: connections leave some for the server itself."""

import json
import resource
import socket
import subprocess
import sys
import time
from contextlib import ExitStack, suppress
from pathlib import Path
from urllib.parse import urlsplit

from hypothesis import given
from hypothesis import strategies as st

from tests.server.api.rpc.wire import connected
from tome_api.v1 import inference_pb2 as pb
from tome_server.api.descriptors import OWN, ConnectionBounds, connection_bounds
from tome_server.cli.serve import FREE_PORTS, start, when_ready


def test_what_is_set_holds_where_there_are_files_enough() -> None:
    assert connection_bounds(2**20, None, 1024, 512) == ConnectionBounds(2**20 - OWN - 1024, 1024, 512)
    assert connection_bounds(20_000, 100, 1024, 512) == ConnectionBounds(100, 1024, 512)


@given(st.integers(16, 2**20), st.none() | st.integers(1, 2**20), st.integers(1, 2**20), st.integers(1, 2**20))
def test_whatever_is_set_descriptors_are_kept_back(limit: int, grpc: int | None, http: int, per_address: int) -> None:
    bounds = connection_bounds(limit, grpc, http, per_address)
    assert bounds.grpc + bounds.http <= limit - min(OWN, limit // 2)
    assert bounds.grpc >= 1
    assert bounds.http >= 1
    assert 1 <= bounds.http_per_address <= per_address


def test_the_limit_of_open_files_is_raised_as_far_as_the_process_may() -> None:
    code = (
        "import resource\nfrom tome_server.api.descriptors import raise_limit\n"
        "resource.setrlimit(resource.RLIMIT_NOFILE, (256, 700))\n"
        "print(raise_limit(), resource.getrlimit(resource.RLIMIT_NOFILE)[0])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout == "700 700\n"


def test_more_connections_than_open_files_leave_the_server_able_to_answer_and_fill_no_log(
    cache: Path, tmp_path: Path, samples: dict[Path, str]
) -> None:
    request = pb.PredictRequest(image=min(samples).read_bytes())
    log = tmp_path / "log"
    flags = [*FREE_PORTS, "--dtype", "float32", "--profile-time", "2s", "--default-budget", "60s"]
    with log.open("w") as stderr, ExitStack() as stack:
        server = start(*flags, stderr=stderr)
        resource.prlimit(server.pid, resource.RLIMIT_NOFILE, (512, 512))  # long before it looks
        stack.enter_context(server)
        stack.callback(server.kill)
        ready = when_ready(server)
        assert ready is not None
        began = time.monotonic()
        with connected(ready["grpc"]) as stub:
            assert stub.Predict(request).predictions
            for address in (urlsplit(ready["metrics"]).netloc, ready["grpc"]):
                host, _, port = address.rpartition(":")
                for _ in range(600):
                    with suppress(OSError):
                        stack.enter_context(socket.create_connection((host, int(port)), timeout=10))
            # Its image's memory, the log and all else that takes a descriptor still get theirs.
            assert stub.Predict(request).predictions
        seconds = time.monotonic() - began
        lines = [json.loads(line) for line in log.read_text().splitlines()]
        assert sum("out of system resource" in line["event"] for line in lines) <= seconds + 1
        assert sum(line["level"] == "error" for line in lines) <= seconds + 1
