"""What a client may do to gRPC itself: bombs, messages without end, pings and resets, beside others."""

import itertools
import socket
import struct
import threading
from contextlib import suppress
from pathlib import Path
from typing import Any

import grpc
import pytest

from tests.server.api.rpc.wire import refusal, until
from tests.server.hostile.attack import MIB, at_most, descriptors, others, resident
from tests.server_process import ServerProcess
from tome_api.v1 import inference_pb2 as pb
from tome_api.v1 import inference_pb2_grpc
from tome_server.api.rpc.server import RpcSettings, server_options

# With the acknowledgement of the server's settings, without which gRPC closes the connection after a minute.
PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes([0, 0, 0, 4, 0, 0, 0, 0, 0]) + bytes([0, 0, 0, 4, 1, 0, 0, 0, 0])
DATA, HEADERS, RST, PING = 0, 1, 3, 6


@pytest.fixture(scope="module")
def image(samples: dict[Path, str]) -> bytes:
    return min(samples).read_bytes()


def frame(kind: int, flags: int, stream: int, payload: bytes = b"") -> bytes:
    return struct.pack(">I", len(payload))[1:] + bytes([kind, flags]) + struct.pack(">I", stream) + payload


def field(name: bytes, value: bytes) -> bytes:
    """Return a header as HPACK writes it without indexing or Huffman's code."""
    return b"\0" + bytes([len(name)]) + name + bytes([len(value)]) + value


def head_of_call(path: bytes = b"/tome_api.v1.Inference/Predict") -> bytes:
    given = {b":method": b"POST", b":scheme": b"http", b":path": path, b":authority": b"x", b"te": b"trailers",
             b"content-type": b"application/grpc"}  # fmt: skip
    return b"".join(field(name, value) for name, value in given.items())


def flood(target: str, parts: list[bytes], most: int) -> tuple[int, bytes]:
    """Send parts in turn on one connection until it is closed, no longer read, or `most` bytes are sent.

    Return how many bytes were sent, and the last that came back: all is read.
    """
    host, _, port = target.rpartition(":")
    sent, said = 0, b""

    def hear() -> None:
        nonlocal said
        with suppress(OSError):
            while part := connection.recv(2**16):
                said = (said + part)[-2000:]

    with socket.create_connection((host, int(port)), timeout=5) as connection:
        hearing = threading.Thread(target=hear)
        hearing.start()
        with suppress(OSError):
            connection.sendall(PREFACE)
            for part in itertools.cycle(parts):
                if sent >= most or not hearing.is_alive():
                    break
                connection.sendall(part)
                sent += len(part)
            connection.shutdown(socket.SHUT_WR)
        hearing.join()
    return sent, said


@pytest.mark.parametrize("algorithm", [grpc.Compression.Gzip, grpc.Compression.Deflate], ids=["gzip", "deflate"])
def test_a_compressed_message_is_refused_before_it_is_inflated(
    server: ServerProcess, image: bytes, algorithm: grpc.Compression
) -> None:
    options = [("grpc.max_send_message_length", -1)]
    with others(server, image), grpc.insecure_channel(server.target, options=options) as channel:
        predict = "/tome_api.v1.Inference/Predict"
        for method in (predict, "/inference.GRPCInferenceService/ModelInfer", "/grpc.health.v1.Health/Check"):
            call = channel.unary_unary(method)
            refused = refusal(lambda call=call: call(bytes(1000), compression=algorithm, timeout=100))
            assert refused.code is grpc.StatusCode.UNIMPLEMENTED
        stream = channel.stream_stream("/tome_api.v1.Inference/PredictStream")
        refused = refusal(lambda: [*stream(iter([bytes(1000)]), compression=algorithm, timeout=100)])
        assert refused.code is grpc.StatusCode.UNIMPLEMENTED
        bomb = channel.unary_unary(predict)
        with at_most(server, 16 * MIB):
            refused = refusal(lambda: bomb(bytes(96 * MIB), compression=algorithm, timeout=100))
        assert refused.code is grpc.StatusCode.UNIMPLEMENTED


def test_compression_can_be_allowed() -> None:
    options = [dict(server_options(RpcSettings("x:1", 1, compression=allowed))) for allowed in (False, True)]
    assert [one.get("grpc.compression_enabled_algorithms_bitset") for one in options] == [1, None]


@pytest.mark.nightly
def test_a_flood_of_pings_is_cut_off(server: ServerProcess, image: bytes) -> None:
    pings = frame(PING, 0, 0, bytes(8)) * 1000
    with others(server, image), at_most(server, 32 * MIB):
        sent, _ = flood(server.target, [pings], 64 * MIB)
    assert sent < 64 * MIB


def test_a_flood_of_resets_leaves_no_call_behind(server: ServerProcess, image: bytes) -> None:
    calls = [
        frame(HEADERS, 4, 2 * i + 1, head_of_call()) + frame(RST, 0, 2 * i + 1, struct.pack(">I", 8))
        for i in range(20_000)
    ]
    parts = [b"".join(calls[i : i + 100]) for i in range(0, len(calls), 100)]
    with others(server, image), at_most(server, 64 * MIB):
        flood(server.target, parts, sum(map(len, parts)))


def test_messages_that_never_end_are_given_back_with_their_connection(server: ServerProcess, image: bytes) -> None:
    before = descriptors(server.process.pid)
    message = pb.PredictRequest(image=bytes(MIB)).SerializeToString()
    host, _, port = server.target.rpartition(":")
    part = b"\0" + struct.pack(">I", len(message)) + message[:8000]
    with (
        others(server, image),
        at_most(server, 32 * MIB),
        socket.create_connection((host, int(port)), timeout=100) as connection,
    ):
        connection.sendall(PREFACE)
        for stream in range(1, 17, 2):
            connection.sendall(frame(HEADERS, 4, stream, head_of_call()) + frame(DATA, 0, stream, part))
    until(lambda: descriptors(server.process.pid) <= before, "the connection is gone")


@pytest.mark.nightly
def test_a_message_is_waited_for_no_longer_than_is_said(server: ServerProcess, image: bytes) -> None:
    """Half of it came; the call gets its status, and the rest of its connection's calls go on."""
    host, _, port = server.target.rpartition(":")
    with socket.create_connection((host, int(port)), timeout=200) as connection:
        half = frame(DATA, 0, 1, b"\0" + struct.pack(">I", 1000) + b"half")
        connection.sendall(PREFACE + frame(HEADERS, 4, 1, head_of_call()) + half)
        said = b""
        while b"did not come within 60 s" not in said:
            part = connection.recv(2**16)
            assert part, said
            said += part
    assert b"grpc-status\x013" in said


def test_answers_that_nobody_reads_keep_no_one_else_from_theirs(server: ServerProcess, image: bytes) -> None:
    before = resident(server.process.pid)
    request = pb.PredictStreamRequest(id="", request=pb.PredictRequest(image=image, no_deadline=True, r=0))

    def endless() -> Any:
        number = 0
        while number < 5000:
            number += 1
            yield pb.PredictStreamRequest(id=str(number), request=request.request)

    with others(server, image), grpc.insecure_channel(server.target) as channel:
        stub = inference_pb2_grpc.InferenceStub(channel)
        # Two: each has up to 64 messages in the server, and with four others would rightly be told that it is full.
        calls = [stub.PredictStream(endless()) for _ in range(2)]
        for call in calls:
            next(call)
        assert resident(server.process.pid) - before < 64 * MIB
        for call in calls:
            call.cancel()
