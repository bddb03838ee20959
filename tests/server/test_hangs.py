"""Parts of a server that hang, for real: it says so, and SIGTERM ends it all the same."""

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import grpc
import pytest
from google.protobuf.duration_pb2 import Duration
from grpc_health.v1 import health_pb2, health_pb2_grpc

from tests.server.api.rpc.wire import connected, refusal, until
from tests.server_process import ServerProcess
from tome_api.v1 import inference_pb2 as pb
from tome_server.cli.serve import FREE_PORTS, when_ready

# A server in which the first image blocks what decodes it, or the event loop, for good.
BLOCKED_THREAD = """
from tome_server.models.preprocess import Preprocess
Preprocess.encoded = lambda *_: block()
"""
BLOCKED_LOOP = """
from tome_server.serving.engine import Engine
Engine.drain = lambda _: block()
"""
SERVE = """
import threading, sys
def block():
    print("blocked", flush=True)
    while True:
        threading.Event().wait()
{blocked}
from tome_server.cli.main import main
main(sys.argv[1:])
"""


@pytest.fixture
def patient(samples: dict[Path, str]) -> pb.PredictRequest:
    return pb.PredictRequest(image=min(samples).read_bytes(), latency_budget=Duration(seconds=600))


def device_of(server: int) -> int:
    [device] = Path(f"/proc/{server}/task/{server}/children").read_text().split()
    return int(device)


@pytest.mark.parametrize("blocked", [BLOCKED_THREAD, BLOCKED_LOOP], ids=["thread", "loop"])
def test_whatever_is_blocked_for_good_a_server_that_is_told_to_stop_ends(
    blocked: str, cache: Path, patient: pb.PredictRequest
) -> None:
    flags = [*FREE_PORTS, "--dtype", "float32", "--profile-time", "2s", "--drain-timeout", "0s"]
    command = [sys.executable, "-c", SERVE.format(blocked=blocked), "serve", *flags]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as server:
        try:
            assert server.stdout is not None
            ready = when_ready(server)
            assert ready is not None
            device = device_of(server.pid)
            with connected(ready["grpc"]) as stub:
                call = stub.Predict.future(patient)
                if blocked is BLOCKED_LOOP:
                    assert call.result().predictions
                    server.send_signal(signal.SIGTERM)
                assert server.stdout.readline() == "blocked\n"
                if blocked is BLOCKED_THREAD:
                    server.send_signal(signal.SIGTERM)
                assert server.wait(60) == 0
            until(lambda: not Path(f"/proc/{device}").exists(), "the device's process ended too")
        finally:
            server.kill()


def test_a_server_whose_device_has_stopped_ends_with_it_when_told_to(
    own_server: Callable[..., ServerProcess], patient: pb.PredictRequest
) -> None:
    server = own_server("--drain-timeout", "0s")
    device = device_of(server.process.pid)
    with connected(server.target) as stub:
        os.kill(device, signal.SIGSTOP)
        call = stub.Predict.future(patient)
        assert server.terminate(60) == 0
        assert refusal(call.result).code in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED)
    until(lambda: not Path(f"/proc/{device}").exists(), "the device's process ended too")


@pytest.mark.nightly
def test_a_device_that_hangs_makes_the_server_unready_and_then_ends_it(
    own_server: Callable[..., ServerProcess], patient: pb.PredictRequest
) -> None:
    server = own_server("--hung-device-timeout", "1s")
    device = device_of(server.process.pid)
    with connected(server.target) as stub, grpc.insecure_channel(server.target) as channel:
        watcher = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest())
        assert next(watcher).status == health_pb2.HealthCheckResponse.SERVING
        os.kill(device, signal.SIGSTOP)
        call = stub.Predict.future(patient)
        assert next(watcher).status == health_pb2.HealthCheckResponse.NOT_SERVING
        assert refusal(call.result).code is grpc.StatusCode.UNAVAILABLE
        assert server.process.wait(60) == 1
    log = server.log.read_text()
    assert "the device hangs: a batch of fashion has run for" in log
    assert log.splitlines()[-1].startswith("tome-server: the process that runs the models did not answer for")
    until(lambda: not Path(f"/proc/{device}").exists(), "the device's process ended too")
