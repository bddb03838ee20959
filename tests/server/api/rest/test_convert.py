import json
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.server.api.oip.attempts import attempt
from tome_server.api.oip.messages import AsBytes, InferResponse, Tensor, split
from tome_server.api.rest.convert import request_from, response_to
from tome_server.errors import InvalidRequestError

SCALARS = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=10))
ANYTHING = st.recursive(
    SCALARS,
    lambda inner: st.one_of(st.lists(inner, max_size=5), st.dictionaries(st.text(max_size=5), inner, max_size=5)),
)
INPUT = st.fixed_dictionaries(
    {"name": st.just("image"), "datatype": st.sampled_from(["FP32", "UINT8", "BYTES", "INT8"])},
    optional={
        "shape": st.one_of(ANYTHING, st.lists(st.integers(-1, 9), max_size=5)),
        "parameters": st.one_of(
            ANYTHING, st.dictionaries(st.sampled_from(["binary_data_size", "content_type", "x"]), SCALARS)
        ),
        "data": st.one_of(ANYTHING, st.lists(SCALARS, max_size=9), st.lists(st.text(max_size=9), max_size=3)),
    },
)
MESSAGE = st.fixed_dictionaries(
    {"inputs": st.one_of(ANYTHING, st.lists(INPUT, max_size=2))},
    optional={"id": ANYTHING, "parameters": ANYTHING, "outputs": st.one_of(ANYTHING, st.lists(INPUT, max_size=2))},
)


@settings(max_examples=500, deadline=None)
@given(st.one_of(ANYTHING, MESSAGE), st.binary(max_size=20), st.one_of(st.none(), st.integers(-5, 5)))
def test_any_body_is_taken_or_refused(message: Any, behind: bytes, off: int | None) -> None:
    text = json.dumps(message).encode()
    length = None if off is None else len(text) + off
    taken, error = attempt(lambda: request_from(text + behind, length, "fashion", ""))
    assert taken or len(str(error)) < 1000


@given(st.binary(max_size=300), st.one_of(st.none(), st.integers(-5, 305)))
def test_any_bytes_are_taken_or_refused(body: bytes, length: int | None) -> None:
    taken, error = attempt(lambda: request_from(body, length, "fashion", ""))
    assert taken or len(str(error)) < 1000


@pytest.mark.parametrize("count", [1, 4096, 10_000])
def test_a_response_of_any_size_is_the_json_it_should_be(count: int) -> None:
    values = np.arange(count, dtype="<f4") / 3
    labels = [f"a “label” {i}\n".encode() for i in range(count)]
    response = InferResponse(
        "m", "1", "me", {"r": 3},
        [Tensor("logits", "FP32", (1, count), values.tobytes()), Tensor("label", "BYTES", (count, 1), labels)],
    )  # fmt: skip
    text, length = response_to(response, AsBytes(every=False))
    assert length is None
    answer = json.loads(text)
    assert (answer["model_name"], answer["model_version"], answer["id"]) == ("m", "1", "me")
    assert answer["parameters"] == {"r": 3}
    logits, label = answer["outputs"]
    assert (logits["name"], logits["datatype"], logits["shape"]) == ("logits", "FP32", [1, count])
    assert logits["data"] == values.tolist()
    assert [one.encode() for one in label["data"]] == labels
    text, length = response_to(response, AsBytes(every=True, named={"logits": False}))
    assert length is not None
    logits, label = json.loads(text[:length])["outputs"]
    assert logits["data"] == values.tolist()
    assert "data" not in label
    assert label["parameters"] == {"binary_data_size": len(text) - length}
    assert split(text[length:], count) == labels


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_what_json_has_no_numbers_for_is_refused_with_the_way_to_it(value: float) -> None:
    values = np.zeros((3, 5000), "<f4")
    values[1, 4500] = value
    response = InferResponse("m", "1", "", {}, [Tensor("features", "FP32", values.shape, values.tobytes())])
    with pytest.raises(
        InvalidRequestError, match=r"^outputs\.features: of image 1 .* ask for it by binary_data"
    ) as refused:
        response_to(response, AsBytes(every=False))
    assert refused.value.field == "outputs.features"
    text, length = response_to(response, AsBytes(every=True))
    assert length is not None
    assert text[length:] == values.tobytes()
