"""What befalls a server from below, for real, and what its clients and its operator then meet."""

import contextlib
import json
import os
import queue
import signal
import socket
import urllib.request
from collections.abc import Callable, Iterator
from datetime import datetime, timedelta
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.protobuf.duration_pb2 import Duration
from grpc_health.v1 import health_pb2, health_pb2_grpc

from tests.server.api.rpc.wire import connected, refusal, refusal_in, refusal_of, scrape, until
from tests.server_process import ServerProcess
from tome_api.v1 import inference_pb2 as pb

UNAVAILABLE = grpc.StatusCode.UNAVAILABLE
SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING


@pytest.fixture(scope="module")
def image(samples: dict[Path, str]) -> bytes:
    return min(samples).read_bytes()


def patient(image: bytes) -> pb.PredictRequest:
    """A request whose deadline doesn't matter."""
    return pb.PredictRequest(image=image, latency_budget=Duration(seconds=200))


def children(pid: int) -> list[int]:
    """The processes that a process has started, those that ended unnoticed included."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            # After the command's name, which may hold anything: state, parent.
            if int(stat.read_text().rpartition(")")[2].split()[1]) == pid:
                found.append(int(stat.parent.name))
    return found


def exists(pid: int) -> bool:
    return Path(f"/proc/{pid}").exists()


def test_when_the_device_is_killed_under_load_everybody_is_told_and_the_server_ends(
    own_server: Callable[..., ServerProcess], image: bytes
) -> None:
    """With a status that has it started again, and at once: it would drain for ten minutes."""
    server = own_server("--drain-timeout", "600s")
    [device] = children(server.process.pid)
    stream_open: queue.SimpleQueue[pb.PredictStreamRequest | None] = queue.SimpleQueue()
    with connected(server.target) as stub, grpc.insecure_channel(server.target) as channel:
        watcher = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest())
        assert next(watcher).status == SERVING
        served = [stub.Predict.future(patient(image)) for _ in range(100)]
        assert all(call.result().predictions for call in served)
        # One batch on the device and the others queued, as long as the test wants.
        os.kill(device, signal.SIGSTOP)
        calls = [stub.Predict.future(patient(image)) for _ in range(60)]
        stream = stub.PredictStream(iter(stream_open.get, None))
        for number in range(20):
            stream_open.put(pb.PredictStreamRequest(id=str(number), request=patient(image)))
        held = "tome_requests_pending"
        until(lambda: scrape(server.metrics_url).total(held) == 80, "all requests are in the server")
        until(lambda: 72 <= scrape(server.metrics_url).total("tome_queue_depth") < 80, "some are on the device")
        os.kill(device, signal.SIGKILL)
        assert [state.status for state in watcher] == [NOT_SERVING]
        assert {(refused.code, refused.message) for refused in map(refusal, [call.result for call in calls])} == {
            (UNAVAILABLE, "the server has stopped")
        }
        answers, end = read(stream)
        stream_open.put(None)
        assert sorted(int(answer.id) for answer in answers) == list(range(20))
        assert {refusal_in(answer.error).code for answer in answers} == {UNAVAILABLE}
        assert end.code is UNAVAILABLE
        assert server.process.wait(60) == 1
        assert refusal(lambda: stub.Predict(patient(image))).code is UNAVAILABLE
    until(lambda: not exists(device), "the device's process is gone")
    *lines, last = server.log.read_text().splitlines()
    death = "the process that runs the models was ended by SIGKILL (the kernel does that where memory runs out)"
    assert last == f"tome-server: {death}"
    errors = [entry for entry in map(json.loads, lines) if entry["level"] == "error"]
    assert [entry["event"] for entry in errors] == [f"{death} (process {device})"]
    # Whatever starts it again finds its port free.
    host, port = server.target.rsplit(":", 1)
    socket.create_server((host, int(port))).close()


def test_a_wall_clock_that_is_set_neither_ends_requests_nor_keeps_them(
    wall_clock: Callable[[str], object], own_server: Callable[..., ServerProcess], image: bytes
) -> None:
    server = own_server()
    [device] = children(server.process.pid)

    def date() -> datetime:
        with urllib.request.urlopen(server.metrics_url) as response:
            return parsedate_to_datetime(response.headers["date"])

    begun = date()

    def ask(count: int, seconds: int) -> list[Any]:
        """Requests of that budget, the first of which has arrived."""
        request = pb.PredictRequest(image=image, latency_budget=Duration(seconds=seconds))
        before = arrived()
        calls = [stub.Predict.future(request) for _ in range(count)]
        until(lambda: arrived() > before, "a request has arrived")
        return calls

    def arrived() -> float:
        """How many requests have ended or are held."""
        metrics = scrape(server.metrics_url)
        return metrics.total("tome_requests_total") + metrics.total("tome_requests_pending")

    with connected(server.target) as stub:
        assert stub.Predict(patient(image)).predictions
        for step, back in (("+30d", "-30d"), ("+0", "+30d")):
            os.kill(device, signal.SIGSTOP)
            waiting = ask(12, 200)
            wall_clock(step)
            os.kill(device, signal.SIGCONT)
            for call in waiting:
                assert 0 < call.result().timing.slack.ToSeconds() <= 200
            # Latencies are predicted as they were before the device stood still, so that a budget of 3 s is taken.
            for _ in range(20):
                stub.Predict(patient(image))
            os.kill(device, signal.SIGSTOP)
            expiring = ask(12, 3)
            wall_clock(back)
            reasons = [refusal(call.result).details["ErrorInfo"].reason for call in expiring]
            # Those in the queue, and whoever came when it was too long already.
            assert "EXPIRED" in reasons
            assert set(reasons) <= {"EXPIRED", "INFEASIBLE"}
            os.kill(device, signal.SIGCONT)
            assert stub.Predict(patient(image)).predictions
        assert abs(date() - begun) > timedelta(days=29), "the server never saw it"


def read(stream: Iterator[Any]) -> tuple[list[Any], Any]:
    """Read a stream to its end; returns the answers, and the status that it ended with unless that is OK."""
    answers = []
    try:
        answers.extend(stream)
    except grpc.RpcError as error:
        return answers, refusal_of(error)
    return answers, None
