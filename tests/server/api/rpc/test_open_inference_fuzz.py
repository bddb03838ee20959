"""Thousands of ModelInfer requests that can't be right: each is refused as one, and the server goes on."""

import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from tests.server.api.rpc.wire import scrape
from tests.server_process import ServerProcess
from tome_api.oip import open_inference_pb2 as pb
from tome_api.oip import open_inference_pb2_grpc

CASES = 2000
REFUSED = (grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.RESOURCE_EXHAUSTED)
CHANNELS, SIDE = 3, 28
SIZES = {"FP32": 4 * CHANNELS * SIDE * SIDE, "UINT8": SIDE * SIDE * 3}
CONTENTS = {"FP32": "fp32_contents", "UINT8": "uint_contents", "BYTES": "bytes_contents"}
OTHERS = {
    "bool_contents": st.booleans(),
    "int_contents": st.integers(-(2**31), 2**31 - 1),
    "int64_contents": st.integers(-(2**63), 2**63 - 1),
    "uint_contents": st.integers(0, 2**32 - 1),
    "uint64_contents": st.integers(0, 2**64 - 1),
    "fp32_contents": st.floats(width=32),
    "fp64_contents": st.floats(),
    "bytes_contents": st.binary(max_size=30),
}
DIMENSION = st.one_of(st.integers(-3, 300), st.sampled_from([2**31, 2**32, 2**40, 2**62, 2**63 - 1, -(2**63)]))
# Anything but nothing, which is no name.
NAMES = st.text(min_size=1, max_size=300)
OUTPUTS = ("logits", "probabilities", "class_id", "label", "features", "patch_features", "token_map")
FLAGS = ("normalize_features", "float16_features")
PARAMETERS = ("latency_budget_ms", "timeout", "priority", "r", "min_r", "max_r", "min_quality", *FLAGS)
INTEGERS = ("timeout", "priority", "r", "min_r", "max_r")


@pytest.fixture(scope="module")
def raw(server: ServerProcess) -> Iterator[Any]:
    with grpc.insecure_channel(server.target) as channel:
        yield open_inference_pb2_grpc.GRPCInferenceServiceStub(channel)


def elements(count: int, image: bytes) -> bytes:
    return (len(image).to_bytes(4, "little") + image) * count


def good(datatype: str, count: int, typed: bool, image: bytes) -> pb.ModelInferRequest:
    """Return a request that would be answered."""
    request = pb.ModelInferRequest(model_name="fashion")
    tensor = request.inputs.add(name="image", datatype=datatype)
    tensor.shape.extend(
        {"FP32": [count, CHANNELS, SIDE, SIDE], "UINT8": [count, SIDE, SIDE, 3], "BYTES": [count]}[datatype]
    )
    if not typed:
        data = elements(count, image) if datatype == "BYTES" else bytes(count * SIZES[datatype])
        request.raw_input_contents.append(data)
    elif datatype == "BYTES":
        tensor.contents.bytes_contents.extend([image] * count)
    else:
        zeros = [0] * (count * CHANNELS * SIDE * SIDE)
        getattr(tensor.contents, CONTENTS[datatype]).extend(zeros)
    return request


Draw = Callable[[st.SearchStrategy[Any]], Any]


def another_shape(request: pb.ModelInferRequest, draw: Draw) -> None:
    tensor = request.inputs[0]
    shape = draw(
        st.one_of(
            st.lists(DIMENSION, max_size=5),
            st.lists(DIMENSION, min_size=4, max_size=4),
            st.lists(DIMENSION, min_size=20, max_size=2000),
            st.permutations([*tensor.shape]),
        )
    )
    right = [*tensor.shape]
    if tensor.datatype == "UINT8":
        # Other heights and widths of as many pixels are images too.
        same = len(shape) == 4 and shape[3] == 3 and min(shape) > 0 and math.prod(shape) == math.prod(right)
        assume(not same)
    elif tensor.datatype == "BYTES":
        assume(shape not in (right, [*right, 1]))
    else:
        assume(shape != right)
    tensor.shape[:] = shape


def another_length(request: pb.ModelInferRequest, draw: Draw) -> None:
    tensor = request.inputs[0]
    if request.raw_input_contents:
        data = request.raw_input_contents[0]
        cut = draw(st.integers(-len(data), 300).filter(bool))
        request.raw_input_contents[0] = data[:cut] if cut < 0 else data + bytes(cut)
        return
    values = getattr(tensor.contents, CONTENTS[tensor.datatype])
    if draw(st.booleans()):
        del values[draw(st.integers(0, len(values) - 1)) :]
    else:
        values.extend([values[0]] * draw(st.integers(1, 300)))


def another_datatype(request: pb.ModelInferRequest, draw: Draw) -> None:
    tensor = request.inputs[0]
    names = ["FP16", "FP64", "BF16", "INT8", "INT32", "INT64", "UINT16", "UINT32", "UINT64", "BOOL", "fp32", ""]
    right = tensor.datatype
    tensor.datatype = draw(st.one_of(st.sampled_from([*names, *CONTENTS]), NAMES).filter(lambda name: name != right))


def another_field(request: pb.ModelInferRequest, draw: Draw) -> None:
    """The elements in the field of another datatype, or in two."""
    tensor = request.inputs[0]
    field = draw(st.sampled_from(sorted(OTHERS)).filter(lambda name: name != CONTENTS[tensor.datatype]))
    if draw(st.booleans()):
        tensor.contents.Clear()
        del request.raw_input_contents[:]
    getattr(tensor.contents, field).extend(draw(st.lists(OTHERS[field], min_size=1, max_size=20)))


def both_kinds(request: pb.ModelInferRequest, draw: Draw) -> None:
    tensor = request.inputs[0]
    if request.raw_input_contents:
        field = draw(st.sampled_from(sorted(OTHERS)))
        getattr(tensor.contents, field).extend(draw(st.lists(OTHERS[field], min_size=1, max_size=20)))
    else:
        request.raw_input_contents.append(draw(st.binary(max_size=50)))


def another_number_of_raw_contents(request: pb.ModelInferRequest, draw: Draw) -> None:
    if request.raw_input_contents and draw(st.booleans()):
        del request.raw_input_contents[:]
    else:
        tensor = request.inputs[0]
        tensor.contents.Clear()
        del request.raw_input_contents[:]
        request.raw_input_contents.extend(draw(st.lists(st.binary(max_size=50), min_size=2, max_size=50)))


def another_number_of_inputs(request: pb.ModelInferRequest, draw: Draw) -> None:
    first = pb.ModelInferRequest.InferInputTensor()
    first.CopyFrom(request.inputs[0])
    del request.inputs[:]
    request.inputs.extend([first] * draw(st.sampled_from([0, 2, 3, 10])))


def another_name(request: pb.ModelInferRequest, draw: Draw) -> None:
    request.inputs[0].name = draw(st.one_of(st.just(""), NAMES).filter(lambda name: name != "image"))


def bytes_that_are_no_images(request: pb.ModelInferRequest, draw: Draw) -> None:
    tensor = request.inputs[0]
    count = draw(st.integers(1, 4))
    tensor.datatype, tensor.shape[:] = "BYTES", [count]
    tensor.contents.Clear()
    del request.raw_input_contents[:]
    junk = draw(st.lists(st.binary(max_size=200), min_size=count, max_size=count))
    kind = draw(st.sampled_from(["typed", "raw", "unprefixed"]))
    if kind == "typed":
        tensor.contents.bytes_contents.extend(junk)
    elif kind == "raw":
        request.raw_input_contents.append(b"".join(elements(1, one) for one in junk))
    else:
        request.raw_input_contents.append(draw(st.binary(max_size=500)))


def values_that_are_none(request: pb.ModelInferRequest, draw: Draw) -> None:
    """NaN and infinity for FP32, more than a byte for UINT8."""
    tensor = request.inputs[0]
    count = draw(st.integers(1, 2))
    where = draw(st.integers(0, count * CHANNELS * SIDE * SIDE - 1))
    datatype = draw(st.sampled_from(["FP32", "UINT8"]))
    tensor.CopyFrom(good(datatype, count, True, b"").inputs[0])
    del request.raw_input_contents[:]
    if datatype == "FP32":
        tensor.contents.fp32_contents[where] = draw(st.sampled_from([math.nan, math.inf, -math.inf]))
    else:
        tensor.contents.uint_contents[where] = draw(st.integers(256, 2**32 - 1))


def too_many_images(request: pb.ModelInferRequest, draw: Draw) -> None:
    tensor = request.inputs[0]
    count = draw(st.integers(257, 5000))
    tensor.contents.Clear()
    del request.raw_input_contents[:]
    tensor.datatype = draw(st.sampled_from(["FP32", "UINT8", "BYTES"]))
    tensor.shape[:] = {"FP32": [count, 3, 1, 1], "UINT8": [count, 1, 1, 3], "BYTES": [count]}[tensor.datatype]
    size = {"FP32": 12, "UINT8": 3, "BYTES": 4}[tensor.datatype]
    request.raw_input_contents.append(bytes(count * size))


def impossible_outputs(request: pb.ModelInferRequest, draw: Draw) -> None:
    known = st.sampled_from(OUTPUTS)
    kind = draw(st.sampled_from(["unknown", "twice", "parameter", "classes"]))
    if kind == "unknown":
        request.outputs.add(name=draw(NAMES.filter(lambda name: name not in CONTENTS)) + "?")
    elif kind == "twice":
        name = draw(known)
        request.outputs.add(name=name)
        request.outputs.add(name=name)
    elif kind == "parameter":
        request.outputs.add(name=draw(known)).parameters[draw(NAMES) + "?"].int64_param = 1
    else:
        value = request.outputs.add(name=draw(known)).parameters["classification"]
        value.int64_param = draw(st.integers(-(2**63), 0))


def impossible_parameters(request: pb.ModelInferRequest, draw: Draw) -> None:
    kind = draw(st.sampled_from(["unknown", "nothing", "text", "number", "flag", "range", "input"]))
    if kind == "unknown":
        request.parameters[draw(NAMES) + "?"].int64_param = draw(st.integers(-(2**63), 2**63 - 1))
    elif kind == "nothing":
        request.parameters[draw(st.sampled_from(PARAMETERS))].SetInParent()
    elif kind == "text":
        request.parameters[draw(st.sampled_from(PARAMETERS))].string_param = draw(st.text(max_size=300))
    elif kind == "number":
        request.parameters[draw(st.sampled_from(INTEGERS))].double_param = draw(st.floats())
    elif kind == "flag":
        request.parameters[draw(st.sampled_from(FLAGS))].int64_param = draw(st.integers(-1, 2))
    elif kind == "range":
        name = draw(st.sampled_from(PARAMETERS).filter(lambda name: name != "timeout"))
        request.parameters[name].int64_param = draw(st.integers(-(2**63), -1))
    else:
        request.inputs[0].parameters[draw(NAMES)].int64_param = 1


def halves_that_cannot_be_written(request: pb.ModelInferRequest, draw: Draw) -> None:
    """FP16 has no field of its own, and what came typed is answered typed."""
    request.CopyFrom(good(request.inputs[0].datatype, draw(st.integers(1, 2)), True, b"not looked at"))
    request.parameters["float16_features"].bool_param = True
    for name in draw(st.sampled_from([(), ("features",), ("patch_features",), ("label", "patch_features")])):
        request.outputs.add(name=name)


FAULTS = (
    another_shape,
    another_length,
    another_datatype,
    another_field,
    both_kinds,
    another_number_of_raw_contents,
    another_number_of_inputs,
    another_name,
    bytes_that_are_no_images,
    values_that_are_none,
    too_many_images,
    impossible_outputs,
    impossible_parameters,
    halves_that_cannot_be_written,
)


def test_whatever_is_wrong_with_a_request_it_is_refused_as_one(raw: Any, server: ServerProcess, file: Path) -> None:
    image = file.read_bytes()
    codes: dict[grpc.StatusCode, int] = {}

    @settings(max_examples=CASES, deadline=None, database=None, suppress_health_check=[*HealthCheck])
    @given(
        st.data(), st.sampled_from(FAULTS), st.sampled_from(sorted(CONTENTS)), st.sampled_from([1, 2, 3]), st.booleans()
    )
    def refused(data: st.DataObject, fault: Callable[..., None], datatype: str, count: int, typed: bool) -> None:
        request = good(datatype, count, typed, image)
        fault(request, data.draw)
        with pytest.raises(grpc.RpcError) as caught:
            raw.ModelInfer(request, timeout=60)
        assert caught.value.code() in REFUSED, f"{fault.__name__}: {caught.value}"
        codes[caught.value.code()] = codes.get(caught.value.code(), 0) + 1

    for datatype in CONTENTS:
        for typed in (False, True):
            assert len(raw.ModelInfer(good(datatype, 2, typed, image)).outputs) == 5
    refused()
    assert sum(codes.values()) >= CASES
    assert set(codes) == set(REFUSED)
    assert scrape(server.metrics_url).total("tome_requests_pending") == 0
    assert len(raw.ModelInfer(good("BYTES", 3, False, image)).outputs) == 5
