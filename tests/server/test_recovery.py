"""Whatever has happened to a server, an idle one answers again what it could answer before, and asks for nothing else.

What it has learned in bad times would otherwise refuse the requests that could correct it: see docs/architecture.md,
"What is learned, and how it is unlearned".
"""

import io
import os
import signal
import time
from collections.abc import Callable
from typing import Any

import grpc
import numpy as np
import pytest
from google.protobuf.duration_pb2 import Duration
from PIL import Image

from tests.server.api.rpc.wire import connected, refusal_of, scrape, until
from tests.server_process import ServerProcess
from tome_api.v1 import inference_pb2 as pb

# Ten times and more what a request takes where nothing else runs.
BUDGET = Duration(seconds=1)
LONG = Duration(seconds=120)


def encode(image: Image.Image, kind: str, **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


@pytest.fixture(scope="module")
def photograph() -> bytes:
    """A JPEG of 12 megapixels."""
    coarse = np.random.default_rng(0).integers(0, 256, (300, 400, 3), np.uint8)
    return encode(Image.fromarray(coarse).resize((4000, 3000)), "JPEG", quality=90)


@pytest.fixture(scope="module")
def dear() -> bytes:
    """A small file that takes half a second or more to decode."""
    return encode(Image.fromarray(np.zeros((6000, 6000), np.uint16)), "PNG")


@pytest.fixture(scope="module")
def image(samples: dict[Any, str]) -> bytes:
    return min(samples).read_bytes()


def recovers(stub: Any, image: bytes, before: str) -> None:
    """Ask with the budget that was enough before, and with no other, until there is an answer."""
    request = pb.PredictRequest(image=image, latency_budget=BUDGET)

    def answered() -> bool:
        end = _end(stub.Predict.future(request))
        assert end in ("OK", "INFEASIBLE", "EXPIRED")
        time.sleep(0.2)  # now and then, as an occasional caller
        return end == "OK"

    until(answered, f"a request is answered after {before}")


def test_after_a_process_was_stopped_with_requests_in_flight(
    own_server: Callable[..., ServerProcess], image: bytes
) -> None:
    server = own_server()
    with connected(server.target) as stub:
        recovers(stub, image, "the start")
        [device] = _children(server.process.pid)
        for pid in (server.process.pid, device):
            os.kill(device, signal.SIGSTOP)
            calls = [stub.Predict.future(pb.PredictRequest(image=image, latency_budget=LONG)) for _ in range(64)]
            until(lambda: scrape(server.metrics_url).total("tome_requests_pending") == 64, "all are in the server")
            os.kill(pid, signal.SIGSTOP)
            time.sleep(3)
            os.kill(device, signal.SIGCONT)
            os.kill(server.process.pid, signal.SIGCONT)
            assert all(call.result().predictions for call in calls)
            recovers(stub, image, "a stop")


def test_after_images_that_took_long_to_decode(
    own_server: Callable[..., ServerProcess], image: bytes, photograph: bytes, dear: bytes
) -> None:
    server = own_server()
    with connected(server.target) as stub:
        recovers(stub, photograph, "the start")
        for file, count in ((dear, 3), (photograph, 40)):
            request = pb.PredictRequest(image=file, latency_budget=LONG)
            calls = [stub.Predict.future(request) for _ in range(count)]
            assert all(call.result().predictions for call in calls)
            recovers(stub, image, "images of another kind")
            recovers(stub, photograph, "a burst of its kind")


def test_overload_by_images_that_are_dear_to_decode_is_answered_in_part_and_over_when_it_ends(
    own_server: Callable[..., ServerProcess], image: bytes, photograph: bytes
) -> None:
    server = own_server()
    with connected(server.target) as stub:
        recovers(stub, photograph, "the start")
        calls = [
            stub.Predict.future(pb.PredictRequest(image=photograph, latency_budget=Duration(seconds=2)))
            for _ in range(100)
        ]
        ends = [_end(call) for call in calls]
        assert "OK" in ends
        assert set(ends) <= {"OK", "INFEASIBLE", "EXPIRED"}
        recovers(stub, image, "overload")
        recovers(stub, photograph, "overload")


def _end(call: Any) -> str:
    try:
        assert call.result().predictions
    except grpc.RpcError as error:
        refused = refusal_of(error)
        assert refused.code is grpc.StatusCode.DEADLINE_EXCEEDED
        return str(refused.details["ErrorInfo"].reason)
    return "OK"


def _children(pid: int) -> list[int]:
    with open(f"/proc/{pid}/task/{pid}/children") as file:  # noqa: PTH123
        return [int(child) for child in file.read().split()]
