"""What clients do wrong, to one server, which must not mind; at the end it is told to stop at full load."""

import json
import queue
import random
import signal
import socket
import struct
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.protobuf.duration_pb2 import Duration

from tests.server.api.rpc.wire import PATIENCE, connected, refusal_of, scrape, until
from tests.server_process import ServerProcess
from tome_api.v1 import inference_pb2 as pb
from tome_api.v1 import inference_pb2_grpc

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes.fromhex("000000040000000000")
VANISHING, AT_ONCE = 1000, 100


@pytest.fixture(scope="module")
def busy(module_server: Callable[..., ServerProcess]) -> ServerProcess:
    return module_server("--default-budget", "600s", "--max-pending", "64", "--drain-timeout", "600s")


@pytest.fixture(scope="module")
def good(samples: dict[Path, str]) -> pb.PredictRequest:
    return pb.PredictRequest(image=min(samples).read_bytes(), latency_budget=Duration(seconds=600))


def open_files(server: ServerProcess) -> int:
    return len(list(Path(f"/proc/{server.process.pid}/fd").iterdir()))


def vanish(connection: socket.socket, *, rudely: bool) -> None:
    """Close a connection; with a reset, what is on the way is lost."""
    if rudely:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    connection.close()


def test_a_thousand_clients_that_connect_and_vanish_leave_nothing_behind(
    busy: ServerProcess, good: pb.PredictRequest
) -> None:
    chance = random.Random(0)
    host, _, port = busy.target.rpartition(":")
    # Nothing, a greeting, a greeting and nonsense, half a greeting, another protocol.
    openings = [b"", PREFACE, PREFACE + bytes(200), PREFACE[:10], b"GET / HTTP/1.1\r\n\r\n"]
    with connected(busy.target) as stub:
        assert stub.Predict(good).predictions
        before = open_files(busy)
        for _ in range(VANISHING // AT_ONCE):
            connections = [socket.create_connection((host, int(port)), PATIENCE) for _ in range(AT_ONCE)]
            for connection in connections:
                connection.sendall(chance.choice(openings))
            for connection in connections:
                vanish(connection, rudely=chance.random() < 0.5)
        # And such that leave while they are being answered.
        for _ in range(20):
            with grpc.insecure_channel(busy.target, [("grpc.use_local_subchannel_pool", 1)]) as channel:
                other = inference_pb2_grpc.InferenceStub(channel)
                for _ in range(3):
                    other.Predict.future(good)
                other.PredictStream(iter([pb.PredictStreamRequest(request=good)]))
        assert stub.Predict(good).predictions
        until(lambda: open_files(busy) <= before + 2, "the connections are gone")
        until(lambda: scrape(busy.metrics_url).total("tome_requests_pending") == 0, "nothing waits")


def test_who_does_not_read_a_streams_answers_is_read_from_no_further(
    busy: ServerProcess, good: pb.PredictRequest
) -> None:
    """Else the answers of one client would fill the server's memory. Others are served meanwhile."""
    total, sent = 5_000, 0

    def messages() -> Iterator[pb.PredictStreamRequest]:
        nonlocal sent
        for number in range(total):
            sent = number + 1
            # Refused without any work, in an answer that repeats the id: 100 MB in all.
            yield pb.PredictStreamRequest(id=f"{number:020000}", request=pb.PredictRequest(image=b""))

    with connected(busy.target) as stub, connected(busy.target) as other:
        call = stub.PredictStream(messages())
        still = threading.Event()
        while not still.wait(1):
            seen = sent
            if seen and not still.wait(2) and sent == seen:
                break
        assert sent < total / 2
        assert other.Predict(good).predictions
        read = sum(1 for _ in call)
        assert read == sent == total


def test_a_server_told_to_stop_at_full_load_loses_no_request(busy: ServerProcess, good: pb.PredictRequest) -> None:
    """Each is answered, or told that the server stops; and what the server says it answered has arrived.

    Clients try again what gRPC cancels, as the documented service config has them do: calls that arrive in the moment
    in which the server sends its connections away.
    """
    policy = {
        "maxAttempts": 5, "initialBackoff": "0.1s", "maxBackoff": "1s", "backoffMultiplier": 2,
        "retryableStatusCodes": ["CANCELLED"],
    }  # fmt: skip
    options = [("grpc.service_config", json.dumps({"methodConfig": [{"name": [{}], "retryPolicy": policy}]}))]
    ends: queue.SimpleQueue[str] = queue.SimpleQueue()
    before = scrape(busy.metrics_url).total("tome_requests_total", code="OK")
    stop = threading.Event()

    def ask(stub: Any) -> None:
        while not stop.is_set():
            try:
                stub.Predict(good, timeout=PATIENCE)
                ends.put("OK")
            except grpc.RpcError as error:
                refused = refusal_of(error)
                ends.put(refused.code.name)
                if refused.code is grpc.StatusCode.UNAVAILABLE:
                    return

    with grpc.insecure_channel(busy.target, options) as channel:
        stub = inference_pb2_grpc.InferenceStub(channel)
        clients = [threading.Thread(target=ask, args=(stub,)) for _ in range(80)]
        for client in clients:
            client.start()
        until(lambda: scrape(busy.metrics_url).total("tome_requests_pending") == 64, "the server is full")
        until(lambda: ends.qsize() > 20, "it answers")
        busy.process.send_signal(signal.SIGTERM)
        for client in clients:
            client.join(PATIENCE)
        assert busy.process.wait(PATIENCE) == 0
        stop.set()
    counted = Counter(ends.get() for _ in range(ends.qsize()))
    # Beyond 64 requests it is full.
    assert counted.keys() <= {"OK", "UNAVAILABLE", "RESOURCE_EXHAUSTED"}
    assert counted["UNAVAILABLE"] == len(clients)
    told = [json.loads(line) for line in busy.log.read_text().splitlines()]
    answered = sum(line["answered"] for line in told if line["event"] == "served")
    assert answered == before + counted["OK"]
