"""Converts messages to the engine's types, and back."""

import math

import numpy as np
from google.protobuf.duration_pb2 import Duration

from tome_api.v1 import inference_pb2 as pb
from tome_server.api.embeddings import embeddings
from tome_server.errors import InvalidRequestError
from tome_server.execution.batch import DEFAULT_TOP_K, Outputs
from tome_server.models.model_info import MergeLevel, ModelInfo
from tome_server.serving.batcher import Served
from tome_server.serving.requests import EncodedImage, ImageInput, Normalised, Pixels, Reply, Request, deadline_of

# As the protobuf specification bounds a Duration: about 10,000 years.
_LONGEST = 315_576_000_000
_MOST_DIMENSIONS = 8


def request_from(message: pb.PredictRequest, arrival: float, time_remaining: float | None) -> Request:
    """Return the engine's request for `message`.

    Its deadline is `arrival` plus the lesser of its budget and the gRPC deadline's `time_remaining`, in seconds. Raises
    InvalidRequestError for fields that no model would accept.
    """
    return Request(
        model=message.model,
        input=_input(message),
        arrival=arrival,
        deadline=deadline_of(arrival, _budget(message), time_remaining),
        r=message.r if message.HasField("r") else None,
        min_r=message.min_r if message.HasField("min_r") else None,
        max_r=message.max_r if message.HasField("max_r") else None,
        min_quality=message.min_quality if message.HasField("min_quality") else None,
        outputs=Outputs(
            top_k=message.top_k if message.HasField("top_k") else DEFAULT_TOP_K,
            features=message.return_features,
            token_map=message.return_token_map,
            patches=message.return_patch_features,
        ),
    )


def response_to(reply: Reply, asked: pb.PredictRequest) -> pb.PredictResponse:
    """Return the message for the engine's reply to a request."""
    labels, result, timing = reply.model.labels, reply.result, reply.timing
    response = pb.PredictResponse(
        model=reply.model.name,
        predictions=[
            pb.Prediction(class_id=class_id, label=labels[class_id] if labels else "", score=score)
            for class_id, score in zip(result.class_ids, result.scores, strict=True)
        ],
        merging=pb.Merging(
            r=reply.r,
            tokens_in=reply.cost.tokens_in,
            tokens_out=reply.cost.tokens[-1],
            flops=reply.flops,
            flops_saved=reply.flops_saved,
        ),
        timing=pb.Timing(
            decode=_duration(timing.decode),
            queue=_duration(timing.queue),
            compute=_duration(timing.compute),
            total=_duration(timing.total),
            slack=None if timing.slack is None else _duration(timing.slack),
            batch_size=timing.batch_size,
            predicted=_duration(timing.predicted),
        ),
    )
    if result.features is not None:
        features = _features(np.frombuffer(result.features, "<f4"), asked)
        if asked.float16_features:
            response.features_float16.CopyFrom(features)
        else:
            response.features.extend(np.frombuffer(features.data, "<f4").tolist())
    if result.patches is not None:
        grid = np.frombuffer(result.patches, "<f4").reshape(*reply.model.patch_grid, -1)
        response.patch_features.CopyFrom(_features(grid, asked))
    if result.token_map is not None:
        height, width = reply.model.patch_grid
        tokens = np.frombuffer(result.token_map, "<i4").tolist()
        response.token_map.CopyFrom(pb.TokenMap(grid_height=height, grid_width=width, token=tokens))
    return response


def _features(values: np.ndarray, asked: pb.PredictRequest) -> pb.Tensor:
    """Return features [..., dim] in the form that the request asked for."""
    values = embeddings(values, normalize=asked.normalize_features, float16=asked.float16_features)
    kind = pb.Tensor.DATA_TYPE_FLOAT16 if asked.float16_features else pb.Tensor.DATA_TYPE_FLOAT32
    return pb.Tensor(data_type=kind, shape=values.shape, data=values.tobytes())


def summary_of(name: str, model: ModelInfo | None) -> pb.ModelSummary:
    """Return the summary of a model; None while it loads."""
    if model is None:
        return pb.ModelSummary(name=name)
    return pb.ModelSummary(name=name, architecture=model.architecture, description=model.description, ready=True)


def model_to(served: Served) -> pb.Model:
    """Return the description of a model."""
    model, settings = served.model, served.model.preprocess.settings
    channels, height, width = settings.input_size
    return pb.Model(
        summary=summary_of(model.name, model),
        input=pb.ImageInput(
            channels=channels,
            height=height,
            width=width,
            mean=settings.mean,
            std=settings.std,
            interpolation=settings.interpolation,
            crop_pct=settings.crop_pct,
            crop_mode=settings.crop_mode,
        ),
        labels=model.labels,
        num_classes=model.num_classes,
        feature_dim=model.feature_dim,
        r_grid=[_level(level, seconds) for level, seconds in zip(model.grid, served.profile.p50[0], strict=True)],
        policy=served.policy,
        default_budget=None if math.isinf(served.default_budget) else _duration(served.default_budget),
        dtype=model.dtype,
    )


def _level(level: MergeLevel, seconds: float) -> pb.MergeLevel:
    message = pb.MergeLevel(
        r=level.r, macs=level.cost.total, tokens_out=level.cost.tokens[-1], latency=_duration(seconds)
    )
    if level.quality is not None:
        message.agreement = level.quality.agreement
        if level.quality.top1 is not None:
            message.top1 = level.quality.top1
    return message


def _input(message: pb.PredictRequest) -> ImageInput:
    kind = message.WhichOneof("input")
    if kind == "image":
        return EncodedImage(message.image)
    if kind is None:
        raise InvalidRequestError("image", "is missing; send image or tensor")
    tensor = message.tensor
    # The error's text repeats the shape, and gRPC drops statuses of more than a few kilobytes.
    if len(tensor.shape) > _MOST_DIMENSIONS:
        raise InvalidRequestError("tensor.shape", f"must have three dimensions, and has {len(tensor.shape):,}")
    if tensor.data_type == pb.Tensor.DATA_TYPE_UINT8:
        return Pixels(tuple(tensor.shape), tensor.data)
    if tensor.data_type == pb.Tensor.DATA_TYPE_FLOAT32:
        return Normalised(tuple(tensor.shape), tensor.data)
    raise InvalidRequestError("tensor.data_type", "must be DATA_TYPE_UINT8 or DATA_TYPE_FLOAT32")


def _budget(message: pb.PredictRequest) -> float | None:
    """Return a request's budget in seconds: None for the model's default, infinite if it has no deadline."""
    if not message.HasField("latency_budget"):
        return math.inf if message.no_deadline else None
    if message.no_deadline:
        raise InvalidRequestError("no_deadline", "can't go with latency_budget")
    budget = message.latency_budget
    seconds = budget.seconds + budget.nanos / 1e9
    if not 0 < seconds <= _LONGEST:
        raise InvalidRequestError(
            "latency_budget", f"must be a positive duration of at most {_LONGEST:,} s, and is {seconds:g} s"
        )
    if not 0 <= budget.nanos < 1e9:
        raise InvalidRequestError("latency_budget", f"must have nanos in 0..999,999,999, and has {budget.nanos:,}")
    return seconds


def _duration(seconds: float) -> Duration:
    duration = Duration()
    duration.FromNanoseconds(round(seconds * 1e9))
    return duration
