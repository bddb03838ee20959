"""Bytes that are no message, on every service of the port: a status that says so, and nothing in the log."""

import socket
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import grpc
import pytest

from tests.server.api.rpc.wire import connected, refusal, scrape
from tests.server_process import ServerProcess
from tome_api.v1 import inference_pb2 as pb
from tome_server.api.rpc.server import MOST_METADATA

GARBAGE = b"\xff\xff\xff"
INVALID = grpc.StatusCode.INVALID_ARGUMENT
UNARY = [
    "/tome_api.v1.Inference/Predict",
    "/tome_api.v1.Inference/GetModel",
    "/tome_api.v1.Inference/ListModels",
    "/inference.GRPCInferenceService/ModelInfer",
    "/inference.GRPCInferenceService/ModelMetadata",
    "/inference.GRPCInferenceService/ServerLive",
    "/inference.GRPCInferenceService/RepositoryModelUnload",
    "/grpc.health.v1.Health/Check",
    "/grpc.health.v1.Health/Watch",
]
STREAMS = [
    "/tome_api.v1.Inference/PredictStream",
    "/inference.GRPCInferenceService/ModelStreamInfer",
    "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo",
]


@contextmanager
def quiet(server: ServerProcess) -> Iterator[None]:
    """Assert that nothing is logged meanwhile but summaries."""
    before = len(server.log.read_text())
    yield
    lines = server.log.read_text()[before:].splitlines()
    assert [line for line in lines if '"event": "served"' not in line] == []


@pytest.mark.parametrize("method", [*UNARY, *STREAMS])
def test_bytes_that_are_no_message_are_an_invalid_argument(server: ServerProcess, method: str) -> None:
    counted = {"model": "unknown", "code": "INVALID_ARGUMENT"}
    before = scrape(server.metrics_url).total("tome_requests_total", **counted)
    with quiet(server), grpc.insecure_channel(server.target) as channel:
        # To gRPC's clients the way in is the same: a unary method is a stream of one message.
        refused = refusal(lambda: list(channel.stream_stream(method)(iter([GARBAGE]), timeout=60)))
    assert (refused.code, refused.field) == (INVALID, "request")
    assert "can't be read" in refused.message
    assert scrape(server.metrics_url).total("tome_requests_total", **counted) == before + 1


def test_a_message_that_is_cut_off_is_no_message(server: ServerProcess, samples: Any) -> None:
    whole = pb.PredictRequest(image=min(samples).read_bytes()).SerializeToString()
    with quiet(server), grpc.insecure_channel(server.target) as channel:
        predict = channel.unary_unary("/tome_api.v1.Inference/Predict")
        assert predict(whole, timeout=60)
        for length in (1, 2, 3, len(whole) // 2, len(whole) - 1):
            assert refusal(lambda length=length: predict(whole[:length], timeout=60)).field == "request"


def frame(kind: int, flags: int, stream: int, payload: bytes) -> bytes:
    """Return a frame of HTTP/2."""
    return struct.pack(">I", len(payload))[1:] + struct.pack(">BBI", kind, flags, stream) + payload


def raw_call(target: str, method: str, body: bytes) -> bytes:
    """Call a method with a body that no client of gRPC would send; return what comes back until the call has ended."""
    headers = {
        ":method": "POST", ":scheme": "http", ":path": method, ":authority": "localhost", "te": "trailers",
        "content-type": "application/grpc",
    }  # fmt: skip
    packed = b"".join(b"\0%c%s%c%s" % (len(n), n.encode(), len(v), v.encode()) for n, v in headers.items())
    host, _, port = target.rpartition(":")
    with socket.create_connection((host, int(port)), timeout=100) as connection, connection.makefile("rb") as answer:
        connection.sendall(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + frame(4, 0, 0, b""))
        connection.sendall(frame(1, 4, 1, packed) + frame(0, 1, 1, body))
        received = b""
        while len(head := answer.read(9)) == 9:
            payload = answer.read(int.from_bytes(head[:3], "big"))
            if head[5:] == b"\0\0\0\1":
                received += payload
                if head[4] & 1 or head[3] == 3:
                    break
        return received


@pytest.mark.parametrize("body", [b"", b"\0\0\0", b"\0\0\0\0\x10cut off", b"\0\xff\xff\xff\xff"], ids=len)
@pytest.mark.parametrize("method", UNARY)
def test_a_call_that_ends_before_its_message_does_is_answered(server: ServerProcess, method: str, body: bytes) -> None:
    with quiet(server):
        received = raw_call(server.target, method, body)
    assert b"grpc-status\x013" in received
    assert b"request: is missing" in received


@pytest.mark.parametrize("method", STREAMS)
def test_a_stream_without_a_message_ends_well(server: ServerProcess, method: str) -> None:
    with quiet(server):
        assert b"grpc-status\x010" in raw_call(server.target, method, b"")


@pytest.mark.parametrize("method", ["/tome_api.v1.Inference/Nothing", "/nobody.Knows/This", "/", "/grpc.health.v1.X/Y"])
def test_an_unknown_method_is_unimplemented_whatever_it_is_sent(server: ServerProcess, method: str) -> None:
    with quiet(server), grpc.insecure_channel(server.target) as channel:
        refused = refusal(lambda: channel.unary_unary(method)(GARBAGE, timeout=60))
    assert refused.code is grpc.StatusCode.UNIMPLEMENTED


def test_a_message_that_is_too_large_is_refused_alone(server: ServerProcess, samples: Any) -> None:
    options = [("grpc.max_send_message_length", -1)]
    with quiet(server), grpc.insecure_channel(server.target, options=options) as channel:
        call = channel.unary_unary("/tome_api.v1.Inference/Predict")
        assert refusal(lambda: call(bytes(33 * 2**20), timeout=60)).code is grpc.StatusCode.RESOURCE_EXHAUSTED
        with connected(server.target) as stub:
            assert stub.ListModels(pb.ListModelsRequest())


def test_metadata_up_to_its_limit_is_taken_and_beyond_it_refused_always(server: ServerProcess) -> None:
    """Not at random in between, as gRPC's own two limits have it."""
    with quiet(server), grpc.insecure_channel(server.target) as channel:
        live = channel.unary_unary("/inference.GRPCInferenceService/ServerLive")

        def call(value: int) -> bytes:
            return bytes(live(b"", timeout=60, metadata=[("x-large", "a" * value)]))

        # What gRPC itself sends with a call takes some 400 bytes.
        for size in (8_000, 9_000, 12_000, 15_500):
            for _ in range(10):
                assert call(size) == b"\x08\x01"
        for size in (MOST_METADATA, 17_000, 60_000):
            for _ in range(10):
                assert refusal(lambda size=size: call(size)).code is grpc.StatusCode.RESOURCE_EXHAUSTED


def test_http_1_on_the_grpc_port_is_closed_and_costs_no_line(server: ServerProcess) -> None:
    host, _, port = server.target.rpartition(":")
    with quiet(server), socket.create_connection((host, int(port)), timeout=100) as connection:
        connection.sendall(b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n")
        while connection.recv(4096):
            pass
