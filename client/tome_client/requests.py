"""What a caller can ask for, and the request messages made of it."""

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
    """What can be asked for beside the image. Every key may be left out; None is as left out, except for `budget`."""

    model: str
    """Name of a hosted model; empty for the server's first."""
    budget: float | timedelta | None
    """Seconds the answer may take from the request's arrival at the server. The request's deadline is the earlier of
    this and the call's timeout. None, or infinity: no deadline. The request then runs when the device has room, and is
    never refused for time. Left out: the model's default budget, or in a stream no deadline."""
    r: int | None
    """Tokens to merge in each block, exactly. Left out: the server chooses in [min_r, max_r]."""
    min_r: int | None
    max_r: int | None
    min_quality: float | None
    """The least quality the server may choose, as a share of the quality at r = 0, in [0, 1]: 0.99 keeps to those r
    whose measured quality is at least 0.99 of it."""
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
    """Let features come as float16: half as long, with three digits, and infinite beyond 65,504."""


@dataclass(frozen=True, slots=True)
class StreamItem:
    """One image of a stream."""

    id: str
    """Returned with the result; unique among the stream's unanswered items."""
    image: Image
    options: PredictOptions = field(default_factory=PredictOptions)


def predict_request(image: Image, options: PredictOptions) -> PredictRequest:
    """Makes the message that asks for one prediction. Ranges are the server's to judge.

    Raises:
        OSError: The image's file cannot be read.
        TypeError: Nothing that can be an image, or an option that does not exist.
        ValueError: An array of a type or shape that is not accepted, or an option's value that the
            message cannot hold.
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
    """Makes the message for one item of a stream; an item that names no budget has no deadline.

    Raises:
        TomeError: INVALID_ARGUMENT, for what `predict_request` raises and for a message larger than
            the channel sends, so that an item that cannot be sent ends like one that the server
            refuses, and does not end the stream.
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
    """Returns the error that an item ends with whose request cannot be made."""
    text = f"the file can't be read: {error.strerror or error}" if isinstance(error, OSError) else str(error)
    return TomeError(grpc.StatusCode.INVALID_ARGUMENT, text)


def _duration(budget: float | timedelta) -> Duration:
    seconds = budget.total_seconds() if isinstance(budget, timedelta) else budget
    if not math.isfinite(seconds):
        raise ValueError(f"a budget is a number of seconds, or None for no deadline; got {budget}")
    duration = Duration()
    duration.FromNanoseconds(round(seconds * 1e9))
    return duration
