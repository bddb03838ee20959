import math
from datetime import timedelta

import grpc
import numpy as np
import pytest

from tome_client.errors import TomeError
from tome_client.requests import PredictOptions, StreamItem, predict_request, stream_request


def test_nothing_asked_for_leaves_every_choice_to_the_server() -> None:
    request = predict_request(b"image", {})
    assert [name.name for name, _ in request.ListFields()] == ["image"]


def test_none_is_as_left_out() -> None:
    options = PredictOptions(r=None, min_r=None, max_r=None, min_quality=None, top_k=None)
    assert predict_request(b"image", options) == predict_request(b"image", {})


@pytest.mark.parametrize("budget", [None, math.inf])
def test_a_budget_of_none_or_without_end_is_no_deadline(budget: float | None) -> None:
    request = predict_request(b"image", {"budget": budget})
    assert request.no_deadline
    assert not request.HasField("latency_budget")


def test_an_item_of_a_stream_that_names_no_budget_has_no_deadline() -> None:
    assert stream_request(StreamItem("a", b"image", PredictOptions(r=2)), 100).request.no_deadline
    request = stream_request(StreamItem("a", b"image", PredictOptions(budget=0.5)), 100).request
    assert (request.no_deadline, request.latency_budget.ToMilliseconds()) == (False, 500)


def test_every_option_reaches_its_field() -> None:
    request = predict_request(
        b"image",
        PredictOptions(
            model="m",
            budget=0.05,
            r=3,
            min_r=1,
            max_r=7,
            min_quality=0.99,
            top_k=2,
            features=True,
            token_map=True,
            patch_features=True,
            normalize=True,
            float16=True,
        ),
    )
    assert request.model == "m"
    assert request.latency_budget.ToMilliseconds() == 50
    assert (request.r, request.min_r, request.max_r, request.top_k) == (3, 1, 7, 2)
    assert request.min_quality == 0.99
    assert request.return_features
    assert request.return_token_map
    assert request.return_patch_features
    assert request.normalize_features
    assert request.float16_features


def test_zero_is_not_left_out() -> None:
    request = predict_request(b"image", {"r": 0, "min_r": 0, "max_r": 0, "min_quality": 0.0})
    assert all(request.HasField(name) for name in ("r", "min_r", "max_r", "min_quality"))


def test_an_array_is_sent_as_a_tensor() -> None:
    request = predict_request(np.zeros((2, 4, 3), np.uint8), {})
    assert request.WhichOneof("input") == "tensor"


@pytest.mark.parametrize(
    ("budget", "nanoseconds"),
    [(0.05, 50_000_000), (2, 2_000_000_000), (timedelta(milliseconds=1.5), 1_500_000), (-1, -(10**9))],
)
def test_a_budget_is_seconds_or_a_timedelta(budget: float | timedelta, nanoseconds: int) -> None:
    assert predict_request(b"", {"budget": budget}).latency_budget.ToNanoseconds() == nanoseconds


@pytest.mark.parametrize("budget", [math.nan, -math.inf])
def test_a_budget_that_is_no_number_of_seconds_is_refused(budget: float) -> None:
    with pytest.raises(ValueError, match="a number of seconds, or None for no deadline; got"):
        predict_request(b"", {"budget": budget})


def test_an_option_that_does_not_exist_is_named() -> None:
    with pytest.raises(TypeError, match="no such option: budjet; there are budget"):
        predict_request(b"", {"budjet": 1})


def test_an_item_that_cannot_be_sent_is_an_invalid_argument_with_its_cause() -> None:
    with pytest.raises(TomeError, match="INVALID_ARGUMENT: the file can't be read: No such file") as caught:
        stream_request(StreamItem("a", "nowhere.png"), 100)
    assert caught.value.code is grpc.StatusCode.INVALID_ARGUMENT
    assert isinstance(caught.value.__cause__, FileNotFoundError)


def test_an_item_keeps_its_id_and_options() -> None:
    message = stream_request(StreamItem("a", b"image", PredictOptions(r=2)), 100)
    assert message.id == "a"
    assert message.request == predict_request(b"image", {"r": 2, "budget": None})


def test_an_item_larger_than_the_channel_sends_is_an_invalid_argument() -> None:
    item = StreamItem("a", b"image")
    size = stream_request(item, 100).ByteSize()
    assert stream_request(item, size)
    with pytest.raises(TomeError, match=rf"{size} bytes; the most is {size - 1}"):
        stream_request(item, size - 1)
