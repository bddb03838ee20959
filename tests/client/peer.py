"""A server that plays a script: what the client does when a real one would rarely do it."""

from __future__ import annotations

import struct
import threading
import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from types import TracebackType

import grpc
from google.protobuf import any_pb2
from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import Message
from google.rpc import status_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_status import rpc_status
from typing_extensions import override

from tome_api.v1 import inference_pb2, inference_pb2_grpc


def status(code: grpc.StatusCode, message: str, *details: Message) -> status_pb2.Status:
    packed = []
    for detail in details:
        packed.append(any_pb2.Any())
        packed[-1].Pack(detail)
    return status_pb2.Status(code=code.value[0], message=message, details=packed)


@dataclass
class Failure:
    code: grpc.StatusCode
    message: str = "scripted"
    trailers: tuple[tuple[str, str | bytes], ...] = ()
    details: tuple[Message, ...] = ()


@dataclass
class Call:
    request: inference_pb2.PredictRequest
    metadata: dict[str, str | bytes]
    time_remaining: float | None
    peer: str
    at: float = field(default_factory=time.monotonic)


class Health(health_pb2_grpc.HealthServicer):
    """Says whether a peer is serving, and says so again when that changes.

    The servicer of grpcio-health-checking deadlocks when a Watch ends while its status is set: it waits for gRPC with a
    lock held that the callback of the Watch's end waits for.
    """

    def __init__(self, serving: bool = True) -> None:
        self._serving = serving
        self._changed = threading.Condition()

    @property
    def serving(self) -> bool:
        return self._serving

    @serving.setter
    def serving(self, serving: bool) -> None:
        with self._changed:
            self._serving = serving
            self._changed.notify_all()

    @override
    def Check(self, request, context):
        return self._response(self._serving)

    @override
    def Watch(self, request, context) -> Iterator:
        context.add_callback(self._wake)
        told = None
        while context.is_active():
            with self._changed:
                self._changed.wait_for(lambda told=told: self._serving != told or not context.is_active())
                told = self._serving
            yield self._response(told)

    def _wake(self) -> None:
        with self._changed:
            self._changed.notify_all()

    @staticmethod
    def _response(serving: bool) -> health_pb2.HealthCheckResponse:
        status = health_pb2.HealthCheckResponse
        return status(status=status.SERVING if serving else status.NOT_SERVING)


class Peer(inference_pb2_grpc.InferenceServicer):
    """Answers with the model's name; before that, with one of `failures` each call, None for no failure.

    A request for the model "missing" gets NOT_FOUND. In a stream, one for "late" is answered after the next,
    one for "fatal" ends the stream with an error and one for "end" without. The features are the number of the image's
    bytes, r, and 0.5.
    """

    def __init__(self, credentials: grpc.ServerCredentials | None = None, health: Health | None = None) -> None:
        self.calls: list[Call] = []
        self.failures: deque[Failure | None] = deque()
        self.hold = threading.Event()
        self.hold.set()
        # As many calls do not wait for `hold`.
        self.free = 0
        self.models = [MODEL.summary]
        self.called = threading.Event()
        self.cancelled = threading.Event()
        self._server = grpc.server(ThreadPoolExecutor(16), options=[("grpc.max_receive_message_length", -1)])
        inference_pb2_grpc.add_InferenceServicer_to_server(self, self._server)
        if health:
            health_pb2_grpc.add_HealthServicer_to_server(health, self._server)
        self.port = (
            self._server.add_secure_port("localhost:0", credentials)
            if credentials
            else self._server.add_insecure_port("127.0.0.1:0")
        )
        self.target = f"localhost:{self.port}" if credentials else f"127.0.0.1:{self.port}"

    def __enter__(self) -> Peer:
        self._server.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.hold.set()
        self._server.stop(None).wait()

    @override
    def Predict(self, request, context):
        self._begin(request, context)
        if request.model == "missing":
            context.abort(grpc.StatusCode.NOT_FOUND, "no such model")
        return answer(request)

    @override
    def PredictStream(self, request_iterator, context) -> Iterator:
        late = []
        for item in request_iterator:
            self._begin(item.request, context)
            if item.request.model == "late":
                late.append(item)
                continue
            if item.request.model == "end":
                return
            if item.request.model == "fatal":
                context.abort(grpc.StatusCode.INTERNAL, "the stream broke")
            yield self._stream_answer(item)
            yield from map(self._stream_answer, late)
            late.clear()

    @override
    def ListModels(self, request, context):
        self._begin(request, context)
        return inference_pb2.ListModelsResponse(models=self.models)

    @override
    def GetModel(self, request, context):
        self._begin(request, context)
        return inference_pb2.GetModelResponse(model=MODEL)

    def _begin(self, request, context) -> None:
        context.add_callback(self.cancelled.set)
        self.calls.append(Call(request, dict(context.invocation_metadata()), context.time_remaining(), context.peer()))
        self.called.set()
        if len(self.calls) > self.free:
            self.hold.wait()
        failure = self.failures.popleft() if self.failures else None
        if failure:
            context.set_trailing_metadata(failure.trailers)
            if failure.details:
                full = status(failure.code, failure.message, *failure.details)
                context.abort_with_status(rpc_status.to_status(full))
            context.abort(failure.code, failure.message)

    def _stream_answer(self, item):
        if item.request.model == "missing":
            error = status(grpc.StatusCode.NOT_FOUND, "no such model")
            return inference_pb2.PredictStreamResponse(id=item.id, error=error)
        return inference_pb2.PredictStreamResponse(id=item.id, response=answer(item.request))


def answer(request: inference_pb2.PredictRequest) -> inference_pb2.PredictResponse:
    predictions = [
        inference_pb2.Prediction(class_id=4, label="Coat", score=0.75),
        inference_pb2.Prediction(class_id=2, label="Trouser", score=0.25),
    ]
    token_map = inference_pb2.TokenMap(grid_height=2, grid_width=2, token=[1, 1, 2, 3])
    features = (min(len(request.image), 60_000), request.r, 0.5)  # float16 holds no more than 65,504
    half = inference_pb2.Tensor(
        data_type=inference_pb2.Tensor.DATA_TYPE_FLOAT16, shape=[3], data=struct.pack("<3e", *features)
    )
    return inference_pb2.PredictResponse(
        features=features if request.return_features and not request.float16_features else None,
        features_float16=half if request.return_features and request.float16_features else None,
        model=request.model or "first",
        predictions=predictions[: request.top_k],
        merging=inference_pb2.Merging(r=request.r, tokens_in=197, tokens_out=101, flops=600, flops_saved=400),
        timing=inference_pb2.Timing(total=Duration(nanos=12_340_000), batch_size=1),
        token_map=token_map if request.return_token_map else None,
    )


MODEL = inference_pb2.Model(
    summary=inference_pb2.ModelSummary(
        name="fashion", architecture="vit_tiny", description="Clothes", ready=True
    ),
    input=inference_pb2.ImageInput(
        channels=1, height=28, width=28, mean=[0.5], std=[0.5],
        interpolation="bicubic", crop_pct=1.0, crop_mode="center",
    ),
    labels=["Trouser", "Coat"],
    num_classes=2,
    feature_dim=192,
    policy="floor",
    default_budget=Duration(nanos=100_000_000),
    dtype="bfloat16",
    r_grid=[
        inference_pb2.MergeLevel(
            r=0, macs=20_000_000, tokens_out=50, top1=0.91, agreement=1.0, latency=Duration(nanos=4_250_000)
        ),
        inference_pb2.MergeLevel(r=4, macs=12_345_678, tokens_out=26),
    ],
)  # fmt: skip
