import asyncio
import json
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from tome_server.api.reading import PART, read_aside
from tome_server.api.rest.convert import request_from
from tome_server.api.rest.request_json import parse
from tome_server.errors import InvalidRequestError

SHAPES = arrays.array_shapes(min_dims=1, max_dims=4, max_side=5)


def read(data: str, shape: list[int], datatype: str = "FP32", *, rest: str = "") -> Any:
    text = f'{{"inputs": [{{"name": "image", "datatype": "{datatype}", "shape": {shape}, "data": {data}{rest}}}]}}'
    return request_from(text.encode(), None, "fashion", "").input.data


@given(arrays.arrays(np.float32, SHAPES), st.sampled_from([None, 1, 4]), st.booleans())
def test_numbers_are_those_that_python_reads(values: np.ndarray, indent: int | None, nested: bool) -> None:
    text = json.dumps((values if nested else values.ravel()).tolist(), indent=indent)
    found = np.frombuffer(read(text, [*values.shape]), "<f4")
    np.testing.assert_array_equal(found, values.ravel())


@pytest.mark.parametrize("rest", ["", " ", '\n , "parameters": {}'])
@pytest.mark.parametrize("spaces", ["", " \n\t"])
def test_numbers_may_stand_anywhere_in_their_input(rest: str, spaces: str) -> None:
    assert read(f"{spaces}[1,2 ,{spaces}255]{spaces}", [1, 3], "UINT8", rest=rest) == bytes([1, 2, 255])


def test_numbers_of_many_parts_are_all_read() -> None:
    values = np.arange(PART, dtype="<f4") / 3
    assert read(json.dumps(values.tolist()), [1, 2, 4, PART // 8]) == values.tobytes()
    assert read(json.dumps(values.reshape(8, -1).tolist()), [8, PART // 8]) == values.tobytes()


@pytest.mark.parametrize(
    ("data", "problem"),
    [
        ("[1, 2, 3]", "is of shape [3]; the shape says [2, 2]"),
        ("[]", "is of shape [0]; the shape says [2, 2]"),
        ("[[1, 2], [3]]", "is neither one list nor nested like the shape [2, 2]"),
        ("[[1, 2, 3, 4]]", "is neither one list nor nested like the shape [2, 2]"),
        ("[[1], 2, 3, 4]", "is neither one list nor nested like the shape [2, 2]"),
        ("[1, 2], [3, 4]", "is neither one list nor nested like the shape [2, 2]"),
        ("[[[1, 2], [3, 4]]]", "is neither one list nor nested like the shape [2, 2]"),
        ("[[1 2], [3, 4]]", "is neither one list nor nested like the shape [2, 2]"),
        ("[1, 2, 3, 4 5]", "is not JSON in what begins with '1, 2, 3, 4 5'"),
        ("[1, 2, 3, 04]", "is not JSON in what begins with '1, 2, 3, 04'"),
        ("[1, , 3, 4]", "is not JSON in what begins with '1, , 3, 4'"),
        ("[1, 2, 3, +4]", "is not JSON in what begins with "),
        ("[1, 2, 3, null]", "of UINT8 must be numbers of that type"),
        ("[1, 2, 3, 99999999999999999999]", "of UINT8 must be numbers of that type"),
        ("[1, 2, 3, -1]", "of UINT8 must lie in 0..255"),
        ("[1, 2, {}, 3]", "of UINT8 must be numbers of that type"),
        ("3", "of UINT8 must be numbers of that type"),
    ],
)
def test_what_are_no_numbers_of_the_shape_is_said(data: str, problem: str) -> None:
    with pytest.raises(InvalidRequestError) as refused:
        read(data, [2, 2], "UINT8")
    assert str(refused.value).startswith(f"inputs.data: {problem}")


def test_a_text_that_looks_like_an_array_stays_as_it_is() -> None:
    text = json.dumps({"id": '"data": [1, 2]', "parameters": {"data": '"data":[3]'}, "inputs": []})
    assert parse(text.encode()) == (json.loads(text), None)


async def test_the_event_loop_goes_on_while_millions_of_numbers_are_read() -> None:
    """Converted in one go they would stop it: it would turn a few times, before and after."""
    count = 2**20
    head = f'{{"inputs": [{{"name": "image", "datatype": "UINT8", "shape": [{count}], "data": ['
    body = head.encode() + b",".join([b"200"] * count) + b"]}]}"
    reading = asyncio.ensure_future(read_aside(request_from, body, None, "fashion", ""))
    turns = 0
    while not reading.done():
        await asyncio.sleep(0)
        turns += 1
    assert reading.result().input.data == bytes([200]) * count
    assert turns > 10
