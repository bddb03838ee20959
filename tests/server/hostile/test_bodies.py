"""Bodies and messages that say much in few bytes: refused or answered at a bounded cost, beside other calls."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import grpc
import pytest

from tests.server.api.rest.wire import INFER, ask
from tests.server.api.rpc.wire import refusal
from tests.server.hostile.attack import MIB, at_most, others
from tests.server_process import ServerProcess
from tome_api.oip import open_inference_pb2 as oip
from tome_api.oip import open_inference_pb2_grpc
from tome_api.v1 import inference_pb2 as pb
from tome_api.v1 import inference_pb2_grpc

SIZE = 8 * MIB
# What one body of JSON may take while it is read, its own bytes among them: docs/security.md.
MEMORY = 128 * MIB
# A gRPC message of 32 MiB, as bytes and as fields.
MESSAGE_MEMORY = 192 * MIB


def tensor(data: bytes, datatype: str = "UINT8", shape: str = "[1, 28, 28, 3]") -> bytes:
    head = f'{{"inputs": [{{"name": "image", "datatype": "{datatype}", "shape": {shape}, "data": '
    return head.encode() + data + b"}]}"


def filled(start: bytes, part: bytes, end: bytes) -> bytes:
    """Return JSON of about SIZE bytes: one part again and again, with commas between."""
    return start + b",".join([part] * ((SIZE - 200) // (len(part) + 1))) + end


def members(start: bytes, end: bytes) -> bytes:
    return start + b",".join(b'"%d":1' % i for i in range(SIZE // 11 - 20)) + end


# By name: the body and the status that it ends with.
BODIES: dict[str, tuple[Callable[[], bytes], int]] = {
    "empty inputs": (lambda: filled(b'{"inputs":[', b"{}", b"]}"), 413),
    "lists for inputs": (lambda: filled(b'{"inputs":[', b"[]", b"]}"), 413),
    "inputs as many as are counted": (lambda: b'{"inputs":[' + b",".join([b"{}"] * 16_000) + b"]}", 400),
    "outputs as many as are counted": (lambda: b'{"outputs":[' + b",".join([b"{}"] * 16_000) + b"]}", 400),
    "a shape of texts": (lambda: tensor(b"[1]", shape="[" + '"",' * 30_000 + "1]"), 400),
    "members": (lambda: members(b"{", b"}"), 413),
    "parameters": (lambda: members(b'{"parameters":{', b"}}"), 413),
    "parameters as many as are counted": (
        lambda: json.dumps({"parameters": {str(i): None for i in range(10_000)}}).encode(), 400,
    ),
    "empty objects as data": (lambda: tensor(filled(b"[", b"{}", b"]")), 413),
    "empty lists as data": (lambda: tensor(filled(b"[", b"[]", b"]")), 400),
    "texts as data": (lambda: tensor(filled(b"[", b'"a"', b"]"), "BYTES"), 413),
    "nesting": (lambda: tensor(b"[" * SIZE)[:SIZE], 413),
    "nesting that is closed": (lambda: tensor(b"[" * (SIZE // 2 - 99) + b"]" * (SIZE // 2 - 99)), 400),
    "nesting as deep as is counted": (lambda: b"[" * 30_000, 400),
    "more numbers than the shape says": (lambda: tensor(filled(b"[", b"1", b"]")), 400),
    "numbers of another type at the end": (
        lambda: tensor(filled(b"[", b"1", b",0.5]"), shape=f"[{(SIZE - 200) // 2 + 1}]"), 400,
    ),
    "one number of millions of digits": (lambda: tensor(b"[" + b"1" * (SIZE - 200) + b"]"), 400),
    "integers of thousands of digits": (lambda: tensor(filled(b"[", b"1" * 4200, b"]"), "FP32", "[1996]"), 400),
    "a shape of thousands of digits": (lambda: tensor(b"[1]", shape="[" + ",".join(["1" * 4200] * 8) + "]"), 400),
    "a budget of thousands of digits": (
        lambda: tensor(b"[1]")[:-1] + b', "parameters": {"latency_budget_ms": ' + b"1" * 4200 + b"}}", 400,
    ),
    "nothing but white space": (lambda: b" " * SIZE, 400),
    "white space within data": (lambda: tensor(b"[1," + b" " * (SIZE - 200) + b"1]"), 400),
    "commas": (lambda: tensor(b"[" + b"," * (SIZE - 200) + b"]"), 400),
    "data named again and again": (lambda: b'"data":' * (SIZE // 7), 413),
    "a text of escapes": (lambda: tensor(b'["' + b"\\u00e9" * (SIZE // 6 - 40) + b'"]', "BYTES", "[1]"), 400),
    "another encoding": (lambda: json.dumps({"inputs": [{}] * 600_000}).encode("utf-16"), 413),
}  # fmt: skip


@pytest.fixture(scope="module")
def image(samples: dict[Path, str]) -> bytes:
    return min(samples).read_bytes()


@pytest.mark.parametrize("name", BODIES)
def test_json_that_says_much_is_refused_at_a_bounded_cost(server: ServerProcess, image: bytes, name: str) -> None:
    make, status = BODIES[name]
    body = make()
    with others(server, image), at_most(server, MEMORY):
        answer = ask(server.metrics_url.removesuffix("/metrics"), INFER, body)
    assert answer.status == status, answer.body[:1000]
    assert answer.json["code"] == {400: "INVALID_ARGUMENT", 413: "RESOURCE_EXHAUSTED"}[status]
    assert len(answer.body) < 1000
    assert "Traceback" not in server.log.read_text()


def varint(number: int) -> bytes:
    encoded = bytearray()
    while number > 127:
        encoded.append(number & 127 | 128)
        number >>= 7
    return bytes([*encoded, number])


def field(kind: Any, name: str, data: bytes) -> bytes:
    """Return a field of bytes as it travels."""
    return varint(kind.DESCRIPTOR.fields_by_name[name].number << 3 | 2) + varint(len(data)) + data


INPUT, CONTENTS = oip.ModelInferRequest.InferInputTensor, oip.InferTensorContents
MOST = 32 * MIB - 100


def contents(name: str, data: bytes) -> bytes:
    tensor = field(INPUT, "name", b"image") + field(INPUT, "datatype", b"FP32")
    return field(oip.ModelInferRequest, "inputs", tensor + field(INPUT, "contents", field(CONTENTS, name, data)))


def repeated(kind: Any, name: str, data: bytes = b"") -> bytes:
    part = field(kind, name, data)
    return part * (MOST // len(part))


MESSAGES: dict[str, tuple[Callable[[], bytes], str]] = {
    "inputs": (lambda: repeated(oip.ModelInferRequest, "inputs"), "RESOURCE_EXHAUSTED"),
    "outputs": (lambda: repeated(oip.ModelInferRequest, "outputs"), "RESOURCE_EXHAUSTED"),
    "parameters": (lambda: repeated(oip.ModelInferRequest, "parameters", b"\n\1a"), "RESOURCE_EXHAUSTED"),
    "raw contents": (lambda: repeated(oip.ModelInferRequest, "raw_input_contents"), "RESOURCE_EXHAUSTED"),
    "elements of BYTES": (
        lambda: field(oip.ModelInferRequest, "inputs",
                      field(INPUT, "contents", repeated(CONTENTS, "bytes_contents")[: MOST - 9])),
        "RESOURCE_EXHAUSTED",
    ),
    "a shape": (
        lambda: field(oip.ModelInferRequest, "inputs", field(INPUT, "shape", b"\1" * (MOST - 9))), "RESOURCE_EXHAUSTED"
    ),
    "integers": (lambda: contents("int64_contents", b"\1" * (MOST - 50)), "RESOURCE_EXHAUSTED"),
    "truths": (lambda: contents("bool_contents", b"\1" * (MOST - 50)), "RESOURCE_EXHAUSTED"),
    "floats": (lambda: contents("fp32_contents", bytes(MOST - 48)), "RESOURCE_EXHAUSTED"),
    "as many floats as are taken": (lambda: contents("fp32_contents", bytes(16 * MIB)), "INVALID_ARGUMENT"),
    "unknown fields": (lambda: b"\xf8\x7f\1" * (MOST // 3), "RESOURCE_EXHAUSTED"),
    "a model's name": (lambda: field(oip.ModelInferRequest, "model_name", b"a" * (MOST - 9)), "INVALID_ARGUMENT"),
    "groups": (lambda: b"\xfb\x7f" * (MOST // 2), "RESOURCE_EXHAUSTED"),
    "an endless integer": (lambda: b"\x80" * MOST, "INVALID_ARGUMENT"),
}  # fmt: skip


@pytest.mark.parametrize("name", MESSAGES)
def test_a_message_of_many_fields_is_refused_at_a_bounded_cost(server: ServerProcess, image: bytes, name: str) -> None:
    make, code = MESSAGES[name]
    message = make()
    with others(server, image), at_most(server, MESSAGE_MEMORY), grpc.insecure_channel(server.target) as channel:
        send = channel.unary_unary("/inference.GRPCInferenceService/ModelInfer")
        refused = refusal(lambda: send(message, timeout=100))
        assert refused.code is grpc.StatusCode[code], refused.message[:1000]
        assert len(refused.message) < 1000
    assert "Traceback" not in server.log.read_text()


def test_every_method_counts_fields_and_a_stream_goes_on_beside_others(server: ServerProcess, image: bytes) -> None:
    flood = b"\xf8\x7f\1" * 100_000
    with others(server, image), grpc.insecure_channel(server.target) as channel:
        for method in (
            "/tome_api.v1.Inference/Predict", "/tome_api.v1.Inference/ListModels", "/grpc.health.v1.Health/Check",
            "/inference.GRPCInferenceService/ServerLive",
        ):  # fmt: skip
            send = channel.unary_unary(method)
            assert refusal(lambda send=send: send(flood)).code is grpc.StatusCode.RESOURCE_EXHAUSTED
        for stub_method in ("/tome_api.v1.Inference/PredictStream", "/inference.GRPCInferenceService/ModelStreamInfer"):
            stream = channel.stream_stream(stub_method)
            assert refusal(lambda stream=stream: [*stream(iter([flood]))]).code is grpc.StatusCode.RESOURCE_EXHAUSTED


def test_a_large_tensor_in_fields_is_answered(server: ServerProcess) -> None:
    """Elements that need the reader's thread give what they give in few."""
    shape, pixels = [40, 28, 28, 3], [i % 256 for i in range(40 * 28 * 28 * 3)]
    typed = oip.ModelInferRequest(model_name="fashion")
    typed.inputs.add(name="image", datatype="UINT8", shape=shape).contents.uint_contents.extend(pixels)
    typed.outputs.add(name="class_id")
    raw = oip.ModelInferRequest(model_name="fashion", raw_input_contents=[bytes(pixels)])
    raw.inputs.add(name="image", datatype="UINT8", shape=shape)
    raw.outputs.add(name="class_id")
    with grpc.insecure_channel(server.target) as channel:
        stub = open_inference_pb2_grpc.GRPCInferenceServiceStub(channel)
        a, b = stub.ModelInfer(typed), stub.ModelInfer(raw)
    assert a.outputs[0].contents.int64_contents == list(memoryview(b.raw_output_contents[0]).cast("q"))


def test_a_model_of_a_very_long_name_is_not_found(server: ServerProcess) -> None:
    with grpc.insecure_channel(server.target) as channel:
        stub = inference_pb2_grpc.InferenceStub(channel)
        refused = refusal(lambda: stub.Predict(pb.PredictRequest(model="a" * MIB, image=b"x")))
    assert refused.code is grpc.StatusCode.NOT_FOUND
    assert len(refused.message) < 1000
