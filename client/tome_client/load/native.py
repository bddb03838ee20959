"""Our own protocol, as the load generator speaks it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import grpc

from tome_api.v1 import inference_pb2, inference_pb2_grpc
from tome_client.channel import Metadata
from tome_client.errors import TomeError, error_from_rpc
from tome_client.load.images import Sample
from tome_client.load.plan import LoadPlan
from tome_client.load.wire import CONNECT_TIMEOUT, Answer
from tome_client.requests import PredictOptions, predict_request
from tome_client.results import ModelInfo, PredictResult, model_info, predict_result


@dataclass(frozen=True, slots=True)
class NativeWire:
    """Our own protocol."""

    model: ModelInfo
    request_options: PredictOptions
    deadline_only: bool
    """Whether requests have no latency budget; see LoadPlan."""
    method: str = "/tome_api.v1.Inference/Predict"

    def options(self, budget: float) -> bytes:
        """Returns the message of a request with that budget, without its image."""
        options = PredictOptions(**{**self.request_options, "budget": budget, "top_k": 1})
        if self.deadline_only:
            del options["budget"]
        options["features"] = options["patch_features"] = options["token_map"] = False
        request = predict_request(b"", options)
        request.ClearField("image")
        return request.SerializeToString()

    def image(self, sample: Sample) -> bytes:
        """Returns the message that holds an image alone."""
        return inference_pb2.PredictRequest(image=sample.data).SerializeToString()

    def judged(self, sample: Sample) -> bool:
        """Whether the image has a label; `describe_native` saw to it that the model has that label."""
        return sample.label is not None

    def read(self, answer: bytes, sample: Sample) -> Answer:
        """Reads an answer."""
        result = predict_result(inference_pb2.PredictResponse.FromString(answer))
        right = None if sample.label is None else _is(sample.label, result)
        return Answer(result.merging, result.timing, right)

    def ending(self, error: TomeError) -> tuple[str, str | None]:
        """Returns the code and the reason that the server gave."""
        return error.code.name, error.reason


async def describe_native(channel: grpc.aio.Channel, plan: LoadPlan, target: str, metadata: Metadata) -> NativeWire:
    """Has the server describe the model.

    Raises:
        TomeError: The server did not.
        ValueError: The model does not have a label of the plan's images.
    """
    stub = inference_pb2_grpc.InferenceStub(channel)
    request = inference_pb2.GetModelRequest(model=plan.options.get("model", ""))
    try:
        model = model_info(await stub.GetModel(request, timeout=CONNECT_TIMEOUT, metadata=metadata))
    except grpc.RpcError as error:
        raise error_from_rpc(error, target) from error
    _check_labels(plan.samples, model)
    return NativeWire(model, plan.options, plan.deadline_only)


def _is(label: str, result: PredictResult) -> bool:
    return any(label in (best.label, str(best.class_id)) for best in result.predictions[:1])


def _check_labels(samples: Sequence[Sample], model: ModelInfo) -> None:
    known = {*model.labels, *map(str, range(model.num_classes))}
    for one in samples:
        if one.label is not None and one.label not in known:
            raise ValueError(
                f"{one.name} is labelled {one.label!r}, which is neither the name nor the index of one of the "
                f"{model.num_classes} classes of {model.summary.name}"
            )
