"""A server of the Open Inference Protocol that plays a script, as servers that are not ours describe their models."""

from __future__ import annotations

import struct
import threading
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from types import TracebackType
from typing import Any

import grpc
from typing_extensions import override

from tests.client.peer import Call, Failure
from tome_api.oip import open_inference_pb2 as oip
from tome_api.oip import open_inference_pb2_grpc as oip_grpc

Tensor = tuple[str, str, list[int]]


class OipPeer(oip_grpc.GRPCInferenceServiceServicer):
    """Describes a model with the given tensors, and answers each image with the same scores: class 1 is the best.

    An inference is answered with one of `failures` first, if there are any.
    """

    def __init__(self, inputs: list[Tensor], outputs: list[Tensor] | None = None, *, typed: bool = False) -> None:
        self.inputs = inputs
        self.outputs = [("scores", "FP32", [-1, 3])] if outputs is None else outputs
        self.typed = typed
        self.calls: list[Call] = []
        self.failures: deque[Failure] = deque()
        self.lock = threading.Lock()
        self._server = grpc.server(ThreadPoolExecutor(8), options=[("grpc.max_receive_message_length", -1)])
        oip_grpc.add_GRPCInferenceServiceServicer_to_server(self, self._server)
        self.target = f"127.0.0.1:{self._server.add_insecure_port('127.0.0.1:0')}"

    def __enter__(self) -> OipPeer:
        self._server.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._server.stop(None).wait()

    @override
    def ServerMetadata(self, request: Any, context: Any) -> Any:
        return oip.ServerMetadataResponse(name="triton", version="2.60.0")

    @override
    def ModelMetadata(self, request: Any, context: Any) -> Any:
        if not request.name:
            context.abort(grpc.StatusCode.INVALID_ARGUMENT, "a model's name must not be empty")
        if request.name == "missing":
            context.abort(grpc.StatusCode.NOT_FOUND, "unknown model missing")
        tensor = oip.ModelMetadataResponse.TensorMetadata
        return oip.ModelMetadataResponse(
            name=request.name,
            platform="onnxruntime_onnx",
            inputs=[tensor(name=name, datatype=kind, shape=shape) for name, kind, shape in self.inputs],
            outputs=[tensor(name=name, datatype=kind, shape=shape) for name, kind, shape in self.outputs],
        )

    @override
    def ModelInfer(self, request: Any, context: Any) -> Any:
        with self.lock:
            self.calls.append(
                Call(request, dict(context.invocation_metadata()), context.time_remaining(), context.peer())
            )
            failure = self.failures.popleft() if self.failures else None
        if failure:
            context.abort(failure.code, failure.message)
        response = oip.ModelInferResponse(model_name=request.model_name)
        output = response.outputs.add(name="scores", datatype="FP32", shape=[1, 3])
        if self.typed:
            output.contents.fp32_contents.extend([0.1, 0.7, 0.2])
        else:
            response.raw_output_contents.append(struct.pack("<3f", 0.1, 0.7, 0.2))
        return response
