"""What tests that go through a real channel share: good requests, refusals taken apart, metrics read."""

import os
import signal
import struct
import time
import urllib.request
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from google.rpc import error_details_pb2, status_pb2
from grpc_status import rpc_status
from prometheus_client import Metric
from prometheus_client.openmetrics.parser import text_string_to_metric_families as openmetrics_families
from prometheus_client.parser import text_string_to_metric_families

from tests.server_process import ServerProcess
from tome_api.v1 import inference_pb2 as pb
from tome_api.v1 import inference_pb2_grpc

MIB = 2**20
DETAILS = {name: getattr(error_details_pb2, name) for name in ("BadRequest", "ResourceInfo", "ErrorInfo", "RetryInfo")}
# What a condition may take on a machine that does other things too; no test waits this long unless it fails.
PATIENCE = 120.0


@dataclass(frozen=True)
class Refusal:
    """A status, and its details by the name of their type."""

    code: grpc.StatusCode
    message: str
    details: dict[str, Any]

    @property
    def field(self) -> str:
        """The request's field that is at fault."""
        (violation,) = self.details["BadRequest"].field_violations
        assert self.message == f"{violation.field}: {violation.description}"
        return violation.field


def refusal(call: Callable[[], object]) -> Refusal:
    """Return what `call` is refused with."""
    with pytest.raises(grpc.RpcError) as caught:
        call()
    return refusal_of(caught.value)


def refusal_of(error: Any) -> Refusal:
    """Return what a failed call was refused with; a status without details is gRPC's own."""
    status = rpc_status.from_call(error)
    if status is None:
        return Refusal(error.code(), error.details(), {})
    return refusal_in(status)


def refusal_in(status: status_pb2.Status) -> Refusal:
    """Return the refusal that a status message holds."""
    code = next(code for code in grpc.StatusCode if code.value[0] == status.code)
    details = {}
    for packed in status.details:
        name = packed.TypeName().removeprefix("google.rpc.")
        details[name] = DETAILS[name]()
        assert packed.Unpack(details[name])
    return Refusal(code, status.message, details)


@contextmanager
def connected(target: str, credentials: grpc.ChannelCredentials | None = None) -> Iterator[Any]:
    """Yield a stub with a channel of its own."""
    channel = grpc.secure_channel(target, credentials) if credentials else grpc.insecure_channel(target)
    with channel:
        yield inference_pb2_grpc.InferenceStub(channel)


def pixels(array: np.ndarray, **fields: Any) -> pb.PredictRequest:
    """Return a request for [H, W, 3] uint8 pixels."""
    tensor = pb.Tensor(data_type=pb.Tensor.DATA_TYPE_UINT8, shape=array.shape, data=array.astype(np.uint8).tobytes())
    return pb.PredictRequest(tensor=tensor, **fields)


def normalised(array: np.ndarray, **fields: Any) -> pb.PredictRequest:
    """Return a request for a [C, H, W] float32 input."""
    tensor = pb.Tensor(data_type=pb.Tensor.DATA_TYPE_FLOAT32, shape=array.shape, data=array.astype("<f4").tobytes())
    return pb.PredictRequest(tensor=tensor, **fields)


def scores(response: pb.PredictResponse) -> np.ndarray:
    """Return the scores by class, 0 for a class that isn't among the predictions."""
    dense = np.zeros(10)
    for prediction in response.predictions:
        dense[prediction.class_id] = prediction.score
    return dense


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def black_png(width: int, height: int) -> bytes:
    """Return a valid grey PNG of any size; a million pixels take one kilobyte, and none is ever held in memory."""
    length = height * (width + 1)
    deflate = zlib.compressobj(9, zlib.DEFLATED, -15)
    # A full flush ends a block on a byte, without reference to what went before: blocks can be repeated.
    block = deflate.compress(bytes(MIB)) + deflate.flush(zlib.Z_FULL_FLUSH)
    end = zlib.compressobj(9, zlib.DEFLATED, -15)
    rest = end.compress(bytes(length % MIB)) + end.flush()
    adler = struct.pack(">I", length % 65521 << 16 | 1)
    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    data = b"\x78\xda" + block * (length // MIB) + rest + adler
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


class Metrics(dict[tuple[str, tuple[tuple[str, str], ...]], float]):
    """Samples by name and labels."""

    def total(self, sample: str, /, **labels: str) -> float:
        """Sum the samples of this name that have these labels."""
        return sum(
            value for (name, given), value in self.items() if name == sample and labels.items() <= dict(given).items()
        )


def exposition(url: str) -> str:
    """Return the text that a metrics endpoint serves."""
    with urllib.request.urlopen(url, timeout=PATIENCE) as response:
        return response.read().decode()


def scrape(url: str) -> Metrics:
    """Read a metrics endpoint."""
    return Metrics(
        {
            (sample.name, tuple(sorted(sample.labels.items()))): sample.value
            for family in text_string_to_metric_families(exposition(url))
            for sample in family.samples
        }
    )


def openmetrics(url: str) -> dict[str, Metric]:
    """Read a metrics endpoint as OpenMetrics, which its parser reads strictly."""
    request = urllib.request.Request(url, headers={"Accept": "application/openmetrics-text; version=1.0.0"})
    with urllib.request.urlopen(request, timeout=PATIENCE) as response:
        assert response.headers["Content-Type"].startswith("application/openmetrics-text")
        return {family.name: family for family in openmetrics_families(response.read().decode())}


def exemplars(families: dict[str, Metric]) -> dict[str, set[str]]:
    """The trace ids that each family's samples name."""
    found = {
        name: {sample.exemplar.labels["trace_id"] for sample in family.samples if sample.exemplar}
        for name, family in families.items()
    }
    return {name: traces for name, traces in found.items() if traces}


@contextmanager
def device_held(server: ServerProcess) -> Iterator[None]:
    """Keep the process that runs a server's models from going on: what is sent meanwhile waits, for as long."""
    pid = server.process.pid
    [device] = map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split())
    os.kill(device, signal.SIGSTOP)
    try:
        yield
    finally:
        with suppress(ProcessLookupError):  # the server may have ended meanwhile
            os.kill(device, signal.SIGCONT)


def until(condition: Callable[[], object], what: str) -> None:
    """Poll until `condition` holds."""
    end = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < end, f"never happened: {what}"
        time.sleep(0.01)
