"""Bodies as clients send them: compressed, as an image alone, and with less than what was announced."""

import base64
import gzip
import json
import socket
import tracemalloc
import zlib
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np
import pytest
import tritonclient.http

from tests.server.api.rest.wire import INFER, JSON_LENGTH, ask, images, infer, outputs
from tests.server.api.rpc.wire import device_held, scrape, until
from tests.server_process import ServerProcess
from tome_server.api.rest.body import inflated
from tome_server.errors import InvalidRequestError, TooLargeError

MIB = 2**20
# As the server bounds it: twice max_image_bytes.
MOST = 32 * MIB
COMPRESS = {"gzip": gzip.compress, "deflate": zlib.compress}


@pytest.fixture(scope="module")
def base(server: ServerProcess) -> str:
    return str(server.metrics_url.removesuffix("/metrics"))


@pytest.fixture(scope="module")
def image(samples: dict[Path, str]) -> bytes:
    return min(samples).read_bytes()


def bomb(coding: str, size: int) -> bytes:
    """Return zeros, compressed without ever being held."""
    deflating = zlib.compressobj(9, wbits={"gzip": 31, "deflate": 15}[coding])
    return b"".join(deflating.compress(bytes(MIB)) for _ in range(size // MIB)) + deflating.flush()


@pytest.mark.parametrize("coding", ["gzip", "deflate"])
@pytest.mark.parametrize("binary", [True, False], ids=["binary", "json"])
def test_tritons_client_may_compress_its_requests(base: str, image: bytes, coding: str, binary: bool) -> None:
    with tritonclient.http.InferenceServerClient(base.removeprefix("http://")) as client:
        made = tritonclient.http.InferInput("image", [1, 28, 28, 3], "UINT8")
        made.set_data_from_numpy(np.zeros((1, 28, 28, 3), np.uint8), binary_data=binary)
        plain = client.infer("fashion", [made], parameters={"r": 0})
        # What it would have compressed comes as it is, which the client takes.
        squeezed = client.infer(
            "fashion", [made], parameters={"r": 0},
            request_compression_algorithm=coding, response_compression_algorithm=coding,
        )  # fmt: skip
    assert squeezed.as_numpy("logits") == pytest.approx(plain.as_numpy("logits"), abs=1e-3)
    assert "Content-Encoding" not in squeezed.get_response()


@pytest.mark.parametrize("name", ["gzip", "GZIP", "x-gzip", "deflate", "identity, gzip", "Identity", "", "identity"])
def test_a_coding_is_taken_in_any_case_of_letters(base: str, image: bytes, name: str) -> None:
    compress = next((compress for coding, compress in COMPRESS.items() if coding in name.lower()), bytes)
    answer = ask(base, INFER, compress(image), {"Content-Encoding": name, "Content-Type": "image/png"})
    assert outputs(answer)["label"] == ["Ankle boot"]


@pytest.mark.parametrize("name", ["br", "zstd", "gzip, gzip", "deflate, gzip", "compress", "x" * 300, "gzip;q=1"])
def test_another_coding_is_415_and_told_which_are_taken(base: str, image: bytes, name: str) -> None:
    answer = ask(base, INFER, image, {"Content-Encoding": name})
    assert (answer.status, answer.json["code"]) == (415, "INVALID_ARGUMENT")
    assert answer.error.startswith(f"Content-Encoding: is '{name[:60]}")
    assert answer.error.endswith("and must be one of gzip, x-gzip, deflate or identity")
    assert answer.headers["accept-encoding"] == "gzip, x-gzip, deflate"


def test_a_damaged_body_is_400_and_says_where(base: str, image: bytes) -> None:
    whole = gzip.compress(image)
    cases = {
        "body: is not gzip: Error -3": [image, whole[:10] + b"\xff" * 20, whole[:-8] + bytes(8), zlib.compress(image)],
        "body: is not gzip: it ends too early": [whole[:5], whole[: len(whole) // 2], whole[:-1]],
        "body: is not gzip alone: 3 bytes follow it": [whole + b"abc"],
    }
    for problem, bodies in cases.items():
        for body in bodies:
            answer = ask(base, INFER, body, {"Content-Encoding": "gzip", JSON_LENGTH: "0"})
            assert (answer.status, answer.error[: len(problem)]) == (400, problem)


@pytest.mark.parametrize("coding", ["gzip", "deflate"])
def test_what_inflates_to_more_than_is_taken_is_413_and_never_held(
    base: str, server: ServerProcess, coding: str
) -> None:
    body = bomb(coding, 8 * MOST)
    answer = ask(base, INFER, body, {"Content-Encoding": coding, JSON_LENGTH: "0"})
    assert answer.status == 413
    assert answer.error == f"the body has more than {MOST:,} bytes, which is the most that is taken"
    tracemalloc.start()
    with pytest.raises(TooLargeError):
        inflated(body, coding, MIB)
    assert tracemalloc.get_traced_memory()[1] < 4 * MIB
    tracemalloc.stop()


def test_what_just_fits_is_taken() -> None:
    body = gzip.compress(bytes(1000))
    assert inflated(body, "gzip", 1000) == bytes(1000)
    with pytest.raises(TooLargeError):
        inflated(body, "gzip", 999)
    with pytest.raises(InvalidRequestError):
        inflated(b"", "gzip", 1000)


def test_an_image_may_say_what_it_is_by_its_type_alone(base: str, image: bytes) -> None:
    for name in ("image/png", "image/jpeg", "IMAGE/PNG", "image/png; q=1"):
        assert outputs(ask(base, INFER, image, {"Content-Type": name}))["label"] == ["Ankle boot"]
    # A length that is given counts, whatever the type says.
    body = json.dumps(images([base64.b64encode(image).decode()], "BYTES", [1], content_type="base64")).encode()
    assert outputs(ask(base, INFER, body, {"Content-Type": "image/png", JSON_LENGTH: str(len(body))}))
    refused = ask(base, INFER, b"no image", {"Content-Type": "image/png"})
    assert (refused.status, refused.error) == (400, "image: is not a JPEG, PNG, WEBP or BMP image")
    assert ask(base, INFER, bytes(33 * MIB), {"Content-Type": "image/png"}).status == 413
    told = ask(base, INFER, image, {"Content-Type": "application/octet-stream"})
    assert "Content-Type: image/" in told.error


def raw(base: str, sent: bytes, *, half_close: bool = False) -> bytes:
    """Send bytes and return what comes back until the server closes."""
    address = urlsplit(base)
    with socket.create_connection((address.hostname, address.port), timeout=100) as connection:
        connection.sendall(sent)
        if half_close:
            connection.shutdown(socket.SHUT_WR)
        parts = []
        while part := connection.recv(2**16):
            parts.append(part)
    return b"".join(parts)


def post(body: bytes, *lines: str) -> bytes:
    head = [f"POST {INFER} HTTP/1.1", "Host: localhost", f"Content-Length: {len(body)}", *lines]
    return "\r\n".join([*head, "", ""]).encode() + body


def test_a_client_that_closes_its_side_has_left(base: str, server: ServerProcess, image: bytes) -> None:
    """It can't be told from one that closed altogether, whose request is given up; nothing else is."""
    with device_held(server):
        assert raw(base, post(image, "Content-Type: image/png"), half_close=True) == b""
        until(lambda: scrape(server.metrics_url).total("tome_requests_pending") == 0, "its request has left")
    assert outputs(infer(base, images([0] * (28 * 28 * 3), "UINT8", [1, 28, 28, 3])))
    # What needs no waiting is answered all the same.
    assert raw(base, b"GET /v2/health/live HTTP/1.1\r\nHost: localhost\r\n\r\n", half_close=True).endswith(b"true}")


@pytest.mark.parametrize("protocol", ["h2c", "websocket"])
def test_a_body_lost_to_an_upgrade_is_said_so(base: str, image: bytes, protocol: str) -> None:
    answer = raw(base, post(image, "Connection: close, Upgrade", f"Upgrade: {protocol}", "Content-Type: image/png"))
    assert answer.startswith(b"HTTP/1.1 400 ")
    assert f"Upgrade: '{protocol}' is not supported".encode() in answer


@pytest.mark.parametrize(
    "sent",
    [
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\4\0\0\0\0\0",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(50),
        b"GET /\xc3\xa9 HTTP/1.1\r\nHost: localhost\r\n\r\n",
        b"GET http://localhost:99999999/v2 HTTP/1.1\r\nHost: localhost\r\n\r\n",
        f"POST {INFER} HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n".encode(),
    ],
    ids=["grpc", "tls", "path", "port", "chunk"],
)
def test_what_is_no_http_1_is_400_and_costs_no_line_of_the_log(base: str, server: ServerProcess, sent: bytes) -> None:
    before = len(server.log.read_text())
    assert raw(base, sent).startswith(b"HTTP/1.1 400 ")
    lines = server.log.read_text()[before:].splitlines()
    assert [line for line in lines if '"event": "served"' not in line] == []
