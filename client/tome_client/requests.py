"""The options of a request, and the messages that are made of them."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from datetime import timedelta
from typing import TypedDict

import grpc
from google.protobuf.duration_pb2 import Duration

from tome_api.v1.inference_pb2 import PredictRequest, PredictStreamRequest
from tome_client.errors import TomeError
from tome_client.inputs import Image, image_input


class PredictOptions(TypedDict, total=False):
    """What can be set beside the image. Every key may be left out; None means the same, except for `budget`."""

    model: str
    """Name of a hosted model; empty for the server's first."""
    budget: float | timedelta | None
    """Seconds from the request's arrival at the server until its answer must be ready. The request's deadline is the
    earlier of this and the call's timeout. None, or infinity: no deadline. The request then runs when the device has
    room, and is never refused for time. Left out: the model's default budget, or in a stream no deadline."""
    r: int | None
    """The exact number of tokens to merge in each block. Left out: the server chooses in [min_r, max_r]."""
    min_r: int | None
    max_r: int | None
    min_quality: float | None
    """The least quality that the server may choose, as a share of the quality at r = 0, in [0, 1]: with 0.99 it
    chooses among those r whose measured quality is at least 0.99 of that at r = 0."""
    top_k: int | None
    """How many of the most probable classes to return; 5 if left out."""
    features: bool
    """Also return the pooled features."""
    token_map: bool
    """Also return which output token each patch was merged into."""
    patch_features: bool
    """Also return the features of each patch; a merged patch has those of its token."""
    normalize: bool
    """Divide the features, and those of each patch, by their Euclidean length."""
    float16: bool
    """Receive features as float16: half the bytes, three digits, and infinite beyond 65,504."""


@dataclass(frozen=True, slots=True)
class StreamItem:
    """One image of a stream."""

    id: str
    """Comes back with the result; unique among the stream's unanswered items."""
    image: Image
    options: PredictOptions = field(default_factory=PredictOptions)


def predict_request(image: Image, options: PredictOptions) -> PredictRequest:
    """Makes the message of one prediction. The server checks the ranges of values.

    Raises:
        OSError: The image's file cannot be read.
        TypeError: `image` is no image, or there is no such option.
        ValueError: An array has a type or shape that is not accepted, or the message cannot hold an option's value.
    """
    unknown = options.keys() - PredictOptions.__optional_keys__
    if unknown:
        raise TypeError(
            f"no such option: {', '.join(sorted(unknown))}; "
            f"there are {', '.join(sorted(PredictOptions.__optional_keys__))}"
        )
    budget = options.get("budget")
    no_deadline = "budget" in options and (budget is None or budget == math.inf)
    request = PredictRequest(
        model=options.get("model", ""),
        latency_budget=None if budget is None or no_deadline else _duration(budget),
        no_deadline=no_deadline,
        r=options.get("r"),
        min_r=options.get("min_r"),
        max_r=options.get("max_r"),
        min_quality=options.get("min_quality"),
        top_k=options.get("top_k"),
        return_features=options.get("features", False),
        return_token_map=options.get("token_map", False),
        return_patch_features=options.get("patch_features", False),
        normalize_features=options.get("normalize", False),
        float16_features=options.get("float16", False),
    )
    sendable = image_input(image)
    if isinstance(sendable, bytes):
        request.image = sendable
    else:
        request.tensor.CopyFrom(sendable)
    return request


def stream_request(item: StreamItem, max_bytes: int) -> PredictStreamRequest:
    """Makes the message of one item of a stream; an item that names no budget has no deadline.

    Raises:
        TomeError: INVALID_ARGUMENT, if `predict_request` raises or the message is larger than the channel sends. The
            item then ends like one that the server refuses, and the stream goes on.
    """
    try:
        request = predict_request(item.image, {"budget": None, **item.options})
    except (OSError, TypeError, ValueError) as error:
        raise unsendable(error) from error
    message = PredictStreamRequest(id=item.id, request=request)
    if (size := message.ByteSize()) > max_bytes:
        raise TomeError(
            grpc.StatusCode.INVALID_ARGUMENT,
            f"the request is larger than may be sent ({size} bytes; the most is {max_bytes})",
        )
    return message


def unsendable(error: Exception) -> TomeError:
    """Returns the error of an item whose message cannot be made."""
    text = f"the file can't be read: {error.strerror or error}" if isinstance(error, OSError) else str(error)
    return TomeError(grpc.StatusCode.INVALID_ARGUMENT, text)


def _duration(budget: float | timedelta) -> Duration:
    seconds = budget.total_seconds() if isinstance(budget, timedelta) else budget
    if not math.isfinite(seconds):
        raise ValueError(f"a budget is a number of seconds, or None for no deadline; got {budget}")
    duration = Duration()
    duration.FromNanoseconds(round(seconds * 1e9))
    return duration
