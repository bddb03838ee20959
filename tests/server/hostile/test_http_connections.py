"""HTTP requests without end, in every part of them: refused at a bounded cost, beside others."""

import json
import select
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

from tests.server.api.rest.wire import INFER, JSON_LENGTH, ask
from tests.server.api.rpc.wire import until
from tests.server.hostile.attack import MIB, at_most, descriptors, others
from tests.server_process import ServerProcess
from tome_server.api.rest.body import BodyMemory
from tome_server.api.rest.connection import Connections
from tome_server.errors import CrowdedError

# What a client that goes on for ever sends until the server has hung up.
ENDLESS = 64 * MIB
# What one connection may take: its head and a read of 256 KiB, and what Python keeps for later.
MEMORY = 16 * MIB
GET = b"GET /v2/health/live HTTP/1.1\r\nHost: localhost\r\n"
POST = f"POST {INFER} HTTP/1.1\r\nHost: localhost\r\n".encode()
CHUNKED = POST + b"Transfer-Encoding: chunked\r\n\r\n"


@pytest.fixture(scope="module")
def image(samples: dict[Path, str]) -> bytes:
    return min(samples).read_bytes()


def connect(server: ServerProcess, source: str = "127.0.0.1") -> socket.socket:
    url = urlsplit(server.metrics_url)
    return socket.create_connection((url.hostname, url.port), timeout=100, source_address=(source, 0))


def send_on(server: ServerProcess, start: bytes, part: bytes) -> tuple[bytes, int]:
    """Send a part again and again until the server hangs up; return what it said and how much it was sent."""
    sent = 0
    with connect(server) as connection:
        said: list[bytes] = []
        hearing = threading.Thread(target=_hear, args=(connection, said))
        hearing.start()
        piece = part * (2**16 // len(part) + 1)
        with suppress(OSError):
            connection.sendall(start)
            while sent < ENDLESS and hearing.is_alive():
                connection.sendall(piece)
                sent += len(piece)
            connection.shutdown(socket.SHUT_WR)
        hearing.join()
    return b"".join(said), sent


def _hear(connection: socket.socket, said: list[bytes]) -> None:
    with suppress(OSError):
        while part := connection.recv(2**16):
            said.append(part)


def statuses(said: bytes) -> list[int]:
    return [int(part[:3]) for part in said.split(b"HTTP/1.1 ")[1:]]


# By name: what comes first, what then comes without end, and the status of the refusal.
ENDLESS_HEADS: dict[str, tuple[bytes, bytes, int]] = {
    "lines": (GET, b"a: b\r\n", 431),
    "empty lines of one letter": (GET, b"a:\r\n", 431),
    "a long value": (GET + b"a: ", b"b", 431),
    "a long name": (GET, b"a", 431),
    "a folded value": (GET + b"a: b\r\n", b" b\r\n", 400),
    "white space before a value": (GET + b"a:", b" ", 431),
    "a target": (b"GET /", b"a", 414),
    "a query": (b"GET /v2?", b"a=b&", 414),
    "a method": (b"", b"G", 400),
    "nothing but line ends": (b"", b"\r\n", 431),
    "the extension of a chunk": (CHUNKED + b"1;", b"a", 431),
    "trailers": (CHUNKED + b"1\r\nx\r\n0\r\n", b"a: b\r\n", 431),
    "a trailer's value": (CHUNKED + b"1\r\nx\r\n0\r\na: ", b"b", 431),
    "the size of a chunk": (CHUNKED, b"0", 431),
    "a body in chunks of a byte": (CHUNKED, b"1\r\nx\r\n", 413),
    "a body longer than it may be": (POST + b"Content-Length: 999999999999\r\n\r\n", b"x", 413),
}


@pytest.mark.parametrize("name", ENDLESS_HEADS)
def test_a_request_without_end_is_refused_at_a_bounded_cost(server: ServerProcess, image: bytes, name: str) -> None:
    start, part, status = ENDLESS_HEADS[name]
    memory = MEMORY if status != 413 else MEMORY + 4 * 32 * MIB
    with others(server, image), at_most(server, memory):
        said, sent = send_on(server, start, part)
    assert statuses(said) == [status], said[:200]
    if status not in (400, 413):
        assert sent < ENDLESS
    assert "Traceback" not in server.log.read_text()


@pytest.mark.parametrize(
    ("sent", "status"),
    [
        (GET + b"a: " + b"b" * 40_000 + b"\r\n\r\n", 431),
        (GET + b"a: b\r\n" * 100 + b"\r\n", 431),
        (b"GET /" + b"a" * 9_000 + b" HTTP/1.1\r\n\r\n", 414),
        (GET + b"a: " + b"b" * 30_000 + b"\r\n\r\n", 200),
        (GET + b"a: b\r\n" * 90 + b"\r\n", 200),
        (b"GET /v2/health/live?" + b"a" * 8_000 + b" HTTP/1.1\r\nHost: localhost\r\n\r\n", 200),
    ],
    ids=["value", "lines", "target", "value that is taken", "lines that are taken", "target that is taken"],
)
def test_a_head_is_taken_up_to_its_bounds_and_beyond_them_refused_in_words(
    server: ServerProcess, sent: bytes, status: int
) -> None:
    with connect(server) as connection:
        connection.sendall(sent)
        answer = connection.recv(2**16)
        assert statuses(answer) == [status]
        if status != 200:
            assert b"connection: close" in answer
            assert "longer than" in json.loads(answer.partition(b"\r\n\r\n")[2])["error"]
            assert connection.recv(1) == b""


def test_requests_sent_before_the_answers_to_others_are_few(server: ServerProcess, image: bytes) -> None:
    with others(server, image), at_most(server, MEMORY):
        said, sent = send_on(server, b"", GET + b"\r\n")
    assert sent < ENDLESS
    assert {*statuses(said)} == {200}
    assert len(statuses(said)) < 1000


def test_places_are_counted_in_all_and_for_each_address() -> None:
    connections = Connections(3, 2)
    assert [connections.enter("a"), connections.enter("a")] == [None, None]
    assert "your address has 2 connections open" in str(connections.enter("a"))
    assert connections.enter("b") is None
    assert "the server has 3 connections open" in str(connections.enter("c"))
    for address in ("a", "a", "b"):
        connections.leave(address)
    assert not connections.by_address


@pytest.mark.nightly
def test_connections_are_bounded_and_metrics_and_health_go_on(
    own_server: Callable[..., ServerProcess], image: bytes, tmp_path: Path
) -> None:
    config = tmp_path / "server.yaml"
    config.write_text("connections: {max_http_connections: 40, max_http_connections_per_address: 30}\n")
    server = own_server("--config", str(config), "--dtype", "float32")
    before = descriptors(server.process.pid)
    with ExitStack() as held:
        for _ in range(30):
            held.enter_context(connect(server))
        until(lambda: descriptors(server.process.pid) >= before + 30, "all are accepted")
        with connect(server) as refused:
            answer = refused.recv(2**16)
            assert statuses(answer) == [503]
            assert b"your address has 30 connections open" in answer
            assert refused.recv(1) == b""
        # Another address of this machine has places left, up to the bound for all.
        others_held = [held.enter_context(connect(server, "127.0.0.2")) for _ in range(10)]
        with connect(server, "127.0.0.3") as refused:
            assert b"the server has 40 connections open" in refused.recv(2**16)
        others_held[0].sendall(GET + b"\r\n")
        assert statuses(others_held[0].recv(2**16)) == [200]
    until(lambda: descriptors(server.process.pid) <= before, "all are given up")
    assert ask(server.metrics_url.removesuffix("/metrics"), "/v2/health/live").status == 200


@pytest.fixture
def slow_server(server: ServerProcess) -> Iterator[Any]:
    before = descriptors(server.process.pid)
    yield server
    until(lambda: descriptors(server.process.pid) <= before, "all connections are given up")


@pytest.mark.nightly
@pytest.mark.parametrize(
    ("sent", "status"),
    [(b"", None), (b"\r\n", None), (b"G", 408), (GET, 408), (GET + b"a", 408), (GET + b"\r\nGET /", 408)],
    ids=["nothing", "a line's end", "a letter", "half a head", "half a line", "half a head after a request"],
)
def test_half_a_head_is_waited_for_no_longer_than_is_said(slow_server: Any, sent: bytes, status: int | None) -> None:
    with connect(slow_server) as connection:
        connection.sendall(sent)
        said: list[bytes] = []
        _hear(connection, said)
        assert statuses(b"".join(said))[-1:] == ([] if status is None else [status])


@pytest.mark.nightly
@pytest.mark.parametrize("start", [POST + b"Content-Length: 9\r\n\r\n", CHUNKED, GET + b"Content-Length: 9\r\n\r\n"])
def test_half_a_body_is_waited_for_no_longer_than_is_said(slow_server: Any, start: bytes) -> None:
    """A letter at a time doesn't help, nor does a path that reads no body."""
    with connect(slow_server) as connection:
        connection.sendall(start)
        said: list[bytes] = []
        _hear(connection, said)
        assert statuses(b"".join(said)) == ([200] if start.startswith(GET) else [408])


@pytest.mark.nightly
def test_an_answer_that_is_not_read_is_given_up(slow_server: Any) -> None:
    """Ten megabytes, of which the kernels hold a part; the rest is the server's until it gives up."""
    count = 100
    given = {"name": "image", "datatype": "UINT8", "shape": [count, 28, 28, 3]}
    pixels = bytes(count * 28 * 28 * 3)
    wanted = [{"name": "patch_features", "parameters": {"binary_data": True}}]
    message = {
        "inputs": [{**given, "parameters": {"binary_data_size": len(pixels)}}],
        "outputs": wanted,
        "parameters": {"no_deadline": True},
    }
    text = json.dumps(message).encode()
    head = POST + f"Content-Length: {len(text) + len(pixels)}\r\n{JSON_LENGTH}: {len(text)}\r\n\r\n".encode()
    before = descriptors(slow_server.process.pid)
    url = urlsplit(slow_server.metrics_url)
    with socket.socket() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.settimeout(100)
        connection.connect((url.hostname, url.port))
        connection.sendall(head + text + pixels)
        assert connection.recv(12) == b"HTTP/1.1 200"
        until(lambda: descriptors(slow_server.process.pid) <= before, "the connection is given up")
        said: list[bytes] = []
        _hear(connection, said)
    assert sum(map(len, said)) < count * 196 * 128 * 4


def test_bodies_hold_no_more_together_than_they_may() -> None:
    memory = BodyMemory(100)
    with memory.holding() as one, memory.holding() as other:
        one.take(60)
        other.take(40)
        with pytest.raises(CrowdedError, match="may hold 100 bytes together; retry in"):
            one.take(1)
    with memory.holding() as later:
        later.take(100)


@pytest.mark.nightly
def test_bodies_that_never_end_leave_room_for_others(slow_server: Any, image: bytes) -> None:
    """Twenty of them, of 20 MiB that have come: as much as is documented is held, and the rest refused."""
    body = bytes(20 * MIB)
    head = POST + f"Content-Length: {31 * MIB}\r\n\r\n".encode()
    with others(slow_server, image), at_most(slow_server, 256 * MIB + 64 * MIB), ExitStack() as held:
        connections = [held.enter_context(connect(slow_server)) for _ in range(20)]
        for connection in connections:
            connection.sendall(head)
            connection.sendall(body)
        until(lambda: len(select.select(connections, [], [], 0)[0]) >= 8, "those beyond the bound are answered")
        answers = [one.recv(2**16) for one in select.select(connections, [], [], 0)[0]]
        assert {*map(statuses_of_first, answers)} == {429}
        assert all(b"retry-after" in answer.lower() for answer in answers)
        # What fits is taken.
        assert ask(slow_server.metrics_url.removesuffix("/metrics"), INFER, b"{}").status == 400
    until(
        lambda: ask(slow_server.metrics_url.removesuffix("/metrics"), INFER, body, {JSON_LENGTH: "0"}).status == 400,
        "what they held is given back",
    )


def statuses_of_first(answer: bytes) -> int:
    return statuses(answer)[0]
