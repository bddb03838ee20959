"""The Open Inference Protocol as Triton's own client speaks it, against the real server."""

import asyncio
import queue
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from google.protobuf.descriptor import Descriptor, EnumDescriptor, FieldDescriptor
from PIL import Image

from tests.server.api.rpc import triton
from tests.server.api.rpc.wire import device_held, refusal, scrape, until
from tests.server_process import ServerProcess
from tome_api.oip import open_inference_pb2 as oip
from tome_api.oip import open_inference_pb2_grpc
from tome_api.v1 import inference_pb2 as pb

OUTPUTS = {
    "logits": ("FP32", [-1, 10]),
    "probabilities": ("FP32", [-1, 10]),
    "class_id": ("INT64", [-1, 1]),
    "label": ("BYTES", [-1, 1]),
    "features": ("FP32", [-1, 128]),
}
# A code and a message.
Refused = tuple[str, str]


@pytest.fixture(scope="module")
def client(server: ServerProcess) -> Iterator[Any]:
    with triton.client.InferenceServerClient(server.target) as connected:
        yield connected


@pytest.fixture(scope="module")
def raw(server: ServerProcess) -> Iterator[Any]:
    """A stub of our own, for what Triton's client wouldn't send."""
    with grpc.insecure_channel(server.target) as channel:
        yield open_inference_pb2_grpc.GRPCInferenceServiceStub(channel)


@pytest.fixture(scope="module")
def files(samples: dict[Path, str]) -> list[Path]:
    return sorted(samples)[:3]


@pytest.fixture(scope="module")
def rgb(files: list[Path]) -> np.ndarray:
    """[3, 28, 28, 3] uint8: the same samples' pixels."""
    return np.stack([np.asarray(Image.open(file).convert("RGB")) for file in files])


@pytest.fixture(scope="module")
def ready_made(rgb: np.ndarray, model: pb.Model) -> np.ndarray:
    """[3, 3, 28, 28] float32: the same samples as the model takes them."""
    mean, std = (np.array(one, np.float32) for one in (model.input.mean, model.input.std))
    return ((rgb / np.float32(255) - mean) / std).transpose(0, 3, 1, 2).astype(np.float32)


def tensor(data: Any, datatype: str) -> Any:
    """Return the input `image`: FP32, UINT8, or encoded images."""
    array = np.array(data, object) if datatype == "BYTES" else np.ascontiguousarray(data)
    made = triton.client.InferInput("image", array.shape, datatype)
    made.set_data_from_numpy(array)
    return made


@pytest.fixture(scope="module")
def encoded(files: list[Path]) -> Any:
    return tensor([file.read_bytes() for file in files], "BYTES")


@pytest.fixture(scope="module")
def one(files: list[Path]) -> Any:
    """A single image."""
    return tensor([files[0].read_bytes()], "BYTES")


def wanted(*names: str, **settings: Any) -> list[Any]:
    return [triton.client.InferRequestedOutput(name, **settings) for name in names]


def parameters(result: Any) -> dict[str, Any]:
    given = result.get_response().parameters
    return {name: getattr(value, value.WhichOneof("parameter_choice")) for name, value in given.items()}


def refused(call: Callable[[], object]) -> Refused:
    """Return the code and the message that `call` is refused with."""
    with pytest.raises(triton.InferenceServerException) as caught:
        call()
    return caught.value.status().removeprefix("StatusCode."), caught.value.message()


# The contract


def fields(message: Descriptor) -> dict[str, tuple[object, ...]]:
    def kind(field: FieldDescriptor) -> object:
        named = field.message_type or field.enum_type
        return named.full_name if named else field.type

    def oneof(field: FieldDescriptor) -> str | None:
        return field.containing_oneof.name if field.containing_oneof else None

    return {field.name: (field.number, kind(field), field.is_repeated, oneof(field)) for field in message.fields}


def test_every_message_is_on_the_wire_what_tritons_client_takes_it_for() -> None:
    theirs = {**triton.service_pb2.DESCRIPTOR.message_types_by_name}
    theirs |= triton.model_config_pb2.DESCRIPTOR.message_types_by_name

    def compare(ours: Descriptor, other: Descriptor) -> None:
        assert fields(ours).items() <= fields(other).items(), ours.full_name
        for nested in ours.nested_types:
            compare(nested, other.nested_types_by_name[nested.name])
        for enum in ours.enum_types:
            compare_enums(enum, other.enum_types_by_name[enum.name])

    def compare_enums(ours: EnumDescriptor, other: EnumDescriptor) -> None:
        assert [(value.name, value.number) for value in ours.values] == [
            (value.name, value.number) for value in other.values
        ]

    messages = oip.DESCRIPTOR.message_types_by_name
    assert len(messages) > 30
    for name, message in messages.items():
        compare(message, theirs[name])
    enums = triton.model_config_pb2.DESCRIPTOR.enum_types_by_name
    for name, enum in oip.DESCRIPTOR.enum_types_by_name.items():
        compare_enums(enum, enums[name])


def test_every_call_takes_and_returns_what_tritons_client_says() -> None:
    def calls(service: Any) -> dict[str, tuple[object, ...]]:
        return {
            call.name: (call.input_type.name, call.output_type.name, call.client_streaming, call.server_streaming)
            for call in service.methods
        }

    name = "GRPCInferenceService"
    ours = calls(oip.DESCRIPTOR.services_by_name[name])
    theirs = calls(triton.service_pb2.DESCRIPTOR.services_by_name[name])
    assert ours.items() <= theirs.items()
    assert {call for call in theirs if call not in ours} == {
        "SystemSharedMemoryStatus", "SystemSharedMemoryRegister", "SystemSharedMemoryUnregister",
        "CudaSharedMemoryStatus", "CudaSharedMemoryRegister", "CudaSharedMemoryUnregister",
        "TraceSetting", "LogSettings",
    }  # fmt: skip


# What a client asks before it sends images


def test_server_and_model_are_live_and_ready(client: Any) -> None:
    assert client.is_server_live()
    assert client.is_server_ready()
    assert client.is_model_ready("fashion")
    assert client.is_model_ready("fashion", "1")
    assert not client.is_model_ready("fashion", "2")
    assert not client.is_model_ready("nobody")


def test_the_server_describes_itself(client: Any) -> None:
    metadata = client.get_server_metadata(as_json=True)
    assert metadata["name"] == "tome-serving"
    assert metadata["version"]
    assert {"classification", "model_configuration", "statistics", "schedule_policy"} <= {*metadata["extensions"]}


def test_metadata_and_config_describe_the_same_model(client: Any) -> None:
    metadata = client.get_model_metadata("fashion")
    assert [(one.name, one.datatype, [*one.shape]) for one in metadata.inputs] == [("image", "FP32", [-1, 3, 28, 28])]
    assert {one.name: (one.datatype, [*one.shape]) for one in metadata.outputs} == OUTPUTS
    assert [*metadata.versions] == ["1"]
    config = client.get_model_config("fashion").config
    assert (config.name, config.max_batch_size) == ("fashion", 8)
    assert [(one.name, one.data_type, [*one.dims]) for one in config.input] == [
        ("image", triton.model_config_pb2.TYPE_FP32, [3, 28, 28])
    ]
    assert {one.name: [-1, *one.dims] for one in config.output} == {name: dims for name, (_, dims) in OUTPUTS.items()}
    assert config.parameters["r_grid"].string_value == "0, 2, 4, 6, 8, 10, 12, 14"
    assert config.parameters["outputs_by_name"].string_value == (
        "patch_features FP32 [N, 196, 128], token_map INT32 [N, 196]"
    )
    assert config.parameters["patch_grid"].string_value == "14, 14"
    assert not config.model_transaction_policy.decoupled


def test_the_repository_lists_the_model_as_ready(client: Any) -> None:
    index = client.get_model_repository_index().models
    assert [(one.name, one.version, one.state) for one in index] == [("fashion", "1", "READY")]


def test_statistics_count_images_batches_and_failures(client: Any, encoded: Any, one: Any) -> None:
    [before] = client.get_inference_statistics("fashion").model_stats
    client.infer("fashion", [encoded])
    refused(lambda: client.infer("fashion", [one], parameters={"r": -1}))
    [after] = client.get_inference_statistics().model_stats
    assert after.inference_count - before.inference_count == 3
    assert 1 <= after.execution_count - before.execution_count <= 3
    assert after.last_inference > before.last_inference
    assert after.inference_stats.fail.count - before.inference_stats.fail.count == 1
    for stage in ("success", "queue", "compute_input", "compute_infer", "compute_output"):
        was, now = (getattr(stats.inference_stats, stage) for stats in (before, after))
        assert now.count - was.count == 3, stage
        assert now.ns > was.ns, stage


# Images in, tensors out


def test_all_forms_of_an_image_get_the_answer_of_our_own_api(
    client: Any, stub: Any, files: list[Path], encoded: Any, rgb: np.ndarray, ready_made: np.ndarray
) -> None:
    own = [
        stub.Predict(pb.PredictRequest(image=file.read_bytes(), r=4, top_k=10, return_features=True)) for file in files
    ]
    for image in (encoded, tensor(rgb, "UINT8"), tensor(ready_made, "FP32")):
        result = client.infer("fashion", [image], parameters={"r": 4})
        assert result.as_numpy("class_id").tolist() == [[reply.predictions[0].class_id] for reply in own]
        assert result.as_numpy("label").tolist() == [[reply.predictions[0].label.encode()] for reply in own]
        assert result.as_numpy("features") == pytest.approx(np.array([reply.features for reply in own]), abs=1e-3)
        probabilities = result.as_numpy("probabilities")
        for row, reply in zip(probabilities, own, strict=True):
            assert {p.class_id: row[p.class_id] for p in reply.predictions} == pytest.approx(
                {p.class_id: p.score for p in reply.predictions}, abs=1e-4
            )
        logits = result.as_numpy("logits")
        assert np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True) == pytest.approx(probabilities, abs=1e-5)


def test_without_a_wish_all_outputs_come_and_else_those_wished_for(client: Any, one: Any) -> None:
    everything = client.infer("fashion", [one], request_id="a", model_version="1").get_response()
    assert {output.name: output.datatype for output in everything.outputs} == {
        name: datatype for name, (datatype, _) in OUTPUTS.items()
    }
    assert (everything.model_name, everything.model_version, everything.id) == ("fashion", "1", "a")
    few = client.infer("fashion", [one], outputs=wanted("label", "logits")).get_response()
    assert [(output.name, [*output.shape]) for output in few.outputs] == [("label", [1, 1]), ("logits", [1, 10])]


def test_classification_ranks_classes_in_text(client: Any, encoded: Any) -> None:
    result = client.infer("fashion", [encoded], outputs=[*wanted("probabilities", class_count=3), *wanted("class_id")])
    ranked = [[text.decode().split(":") for text in row] for row in result.as_numpy("probabilities")]
    assert [len(row) for row in ranked] == [3, 3, 3]
    for row, class_id in zip(ranked, result.as_numpy("class_id"), strict=True):
        scores = [float(score) for score, _, _ in row]
        assert scores == sorted(scores, reverse=True)
        assert int(row[0][1]) == class_id[0]
    assert ranked[0][0][2] == "Ankle boot"
    # More than there are gives all.
    everything = client.infer("fashion", [encoded], outputs=wanted("logits", class_count=99)).as_numpy("logits")
    assert everything.shape == (3, 10)


def test_the_answer_says_what_was_done_for_it(client: Any, encoded: Any, one: Any, model: pb.Model) -> None:
    tokens = {level.r: level.tokens_out for level in model.r_grid}
    alone = parameters(client.infer("fashion", [one], parameters={"r": 8}))
    assert set(alone) == {
        "r", "tokens_in", "tokens_out", "flops", "flops_saved", "queue_us", "compute_us", "slack_us",
    }  # fmt: skip
    assert alone["r"] == 8
    assert alone["tokens_out"] == tokens[8]
    assert 0 < alone["flops_saved"] < alone["flops"] + alone["flops_saved"]
    assert alone["compute_us"] > 0
    three = parameters(client.infer("fashion", [encoded], parameters={"r": 8}))
    for total in ("tokens_in", "tokens_out", "flops", "flops_saved"):
        assert three[total] == 3 * alone[total]


def test_typed_contents_are_answered_with_typed_contents(
    raw: Any, ready_made: np.ndarray, rgb: np.ndarray, files: list[Path]
) -> None:
    forms = {
        "FP32": (ready_made.shape, oip.InferTensorContents(fp32_contents=ready_made.ravel().tolist())),
        "UINT8": (rgb.shape, oip.InferTensorContents(uint_contents=rgb.ravel().tolist())),
        "BYTES": ([3], oip.InferTensorContents(bytes_contents=[file.read_bytes() for file in files])),
    }
    answers = []
    for datatype, (shape, contents) in forms.items():
        request = oip.ModelInferRequest(model_name="fashion")
        request.inputs.add(name="image", datatype=datatype, shape=shape, contents=contents)
        response = raw.ModelInfer(request)
        assert not response.raw_output_contents
        outputs = {output.name: output.contents for output in response.outputs}
        assert len(outputs["logits"].fp32_contents) == 30
        assert len(outputs["features"].fp32_contents) == 3 * 128
        answers.append(([*outputs["class_id"].int64_contents], [*outputs["label"].bytes_contents]))
    assert answers[0][1][0] == b"Ankle boot"
    assert answers == [answers[0]] * 3


# Features, of images and of patches


def floats(message: pb.Tensor) -> np.ndarray:
    """A tensor of our own API's answer."""
    dtype = {pb.Tensor.DATA_TYPE_FLOAT16: "<f2", pb.Tensor.DATA_TYPE_FLOAT32: "<f4"}[message.data_type]
    return np.frombuffer(message.data, dtype).reshape(message.shape)


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("r", [0, 8])
def test_features_come_normalised_and_halved_on_request_as_on_our_own_api(
    client: Any, stub: Any, files: list[Path], encoded: Any, r: int, normalize: bool
) -> None:
    own = [
        stub.Predict(
            pb.PredictRequest(
                image=file.read_bytes(), r=r, return_features=True, normalize_features=normalize, float16_features=True
            )
        ).features_float16
        for file in files
    ]
    settings = {"r": r, "normalize_features": normalize}
    full = client.infer("fashion", [encoded], outputs=wanted("features"), parameters=settings).as_numpy("features")
    half = client.infer(
        "fashion", [encoded], outputs=wanted("features"), parameters={**settings, "float16_features": True}
    ).as_numpy("features")
    assert (full.dtype, full.shape) == (np.float32, (3, 128))
    assert (half.dtype, half.shape) == (np.float16, (3, 128))
    # As close as batch-mates leave it, and as float16 can say.
    assert full == pytest.approx(np.stack([floats(one) for one in own]).astype(np.float32), rel=2e-3, abs=2e-3)
    assert half.astype(np.float32) == pytest.approx(full, rel=2e-3, abs=2e-3)
    if normalize:
        assert np.linalg.norm(full, axis=1) == pytest.approx(1, abs=1e-5)


def test_features_of_patches_are_those_of_our_own_api(client: Any, stub: Any, files: list[Path], encoded: Any) -> None:
    asked = {"return_patch_features": True, "return_token_map": True, "normalize_features": True}
    own = [stub.Predict(pb.PredictRequest(image=file.read_bytes(), r=0, **asked)) for file in files]
    names = ("patch_features", "token_map", "label")
    settings = {"r": 0, "normalize_features": True}
    result = client.infer("fashion", [encoded], outputs=wanted(*names), parameters=settings)
    assert [output.name for output in result.get_response().outputs] == [*names]
    patches, token_map = result.as_numpy("patch_features"), result.as_numpy("token_map")
    assert (patches.dtype, patches.shape) == (np.float32, (3, 196, 128))
    assert patches == pytest.approx(np.stack([floats(one.patch_features).reshape(196, 128) for one in own]), abs=1e-3)
    assert (token_map.dtype, token_map.shape) == (np.int32, (3, 196))
    # Nothing is merged: each patch is its own token, after the class token.
    assert token_map.tolist() == [list(one.token_map.token) for one in own] == [list(range(1, 197))] * 3


def test_patches_of_one_token_have_its_features_and_no_others(client: Any, one: Any) -> None:
    settings = {"r": 8, "float16_features": True}
    result = client.infer("fashion", [one], outputs=wanted("token_map", "patch_features"), parameters=settings)
    [patches], [token_map] = result.as_numpy("patch_features"), result.as_numpy("token_map")
    assert patches.dtype == np.float16
    tokens = parameters(result)["tokens_out"]
    assert set(token_map.tolist()) == set(range(1, tokens))
    features = {token: patches[token_map == token] for token in range(1, tokens)}
    assert all((rows == rows[0]).all() for rows in features.values())
    assert len(np.unique(patches, axis=0)) == tokens - 1


def test_patches_typed_come_in_the_fields_of_their_datatypes(raw: Any, rgb: np.ndarray) -> None:
    request = oip.ModelInferRequest(model_name="fashion")
    contents = oip.InferTensorContents(uint_contents=rgb.ravel().tolist())
    request.inputs.add(name="image", datatype="UINT8", shape=rgb.shape, contents=contents)
    request.outputs.add(name="patch_features")
    request.outputs.add(name="token_map")
    request.parameters["r"].int64_param = 0
    patches, token_map = raw.ModelInfer(request).outputs
    assert len(patches.contents.fp32_contents) == 3 * 196 * 128
    assert token_map.contents.int_contents == [*range(1, 197)] * 3


def test_float16_where_the_answer_is_typed_is_refused_with_the_way_to_it(raw: Any, files: list[Path]) -> None:
    request = oip.ModelInferRequest(model_name="fashion")
    contents = oip.InferTensorContents(bytes_contents=[files[0].read_bytes()])
    request.inputs.add(name="image", datatype="BYTES", shape=[1], contents=contents)
    request.parameters["float16_features"].bool_param = True
    said = refusal(lambda: raw.ModelInfer(request))
    assert said.field == "parameters.float16_features"
    assert "features can't come as FP16 here" in said.message
    assert "over gRPC if the image is in raw_input_contents" in said.message
    # What has no features asks for nothing that can't be.
    request.outputs.add(name="label")
    assert raw.ModelInfer(request).outputs[0].contents.bytes_contents == [b"Ankle boot"]


def test_more_elements_than_are_given_one_by_one_are_refused_before_any_is_computed(raw: Any) -> None:
    request = oip.ModelInferRequest(model_name="fashion")
    pixel = oip.InferTensorContents(uint_contents=[0] * (200 * 3))
    request.inputs.add(name="image", datatype="UINT8", shape=[200, 1, 1, 3], contents=pixel)
    request.outputs.add(name="patch_features")
    said = refusal(lambda: raw.ModelInfer(request))
    assert said.code is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert said.message.startswith("the outputs of 200 images have 5,017,600 elements; at most 4,194,304 are given")


# Deadlines and bounds


def test_the_grpc_deadline_of_an_unmodified_client_counts(client: Any, one: Any) -> None:
    assert parameters(client.infer("fashion", [one]))["slack_us"] > 50e6  # the server's default is a minute
    # On the wire the time is rounded up, to some hundredths more.
    assert parameters(client.infer("fashion", [one], client_timeout=20))["slack_us"] < 21e6


@pytest.mark.parametrize(
    "settings",
    [
        {"timeout": 20_000_000},
        {"parameters": {"latency_budget_ms": 20_000.5}},
        {"timeout": 20_000_000, "parameters": {"latency_budget_ms": 40_000}},
    ],
)
def test_a_timeout_or_budget_counts(client: Any, one: Any, settings: dict[str, Any]) -> None:
    assert 0 < parameters(client.infer("fashion", [one], **settings))["slack_us"] < 20_000_500


def test_a_timeout_of_0_is_none_and_priority_is_taken(client: Any, one: Any) -> None:
    assert parameters(client.infer("fashion", [one], timeout=0, priority=3))["slack_us"] > 50e6


@pytest.mark.parametrize("settings", [{"timeout": 1}, {"parameters": {"latency_budget_ms": 0.001}}])
def test_what_cannot_be_in_time_is_refused_with_what_could_be(client: Any, one: Any, settings: dict[str, Any]) -> None:
    code, message = refused(lambda: client.infer("fashion", [one], **settings))
    assert code == "DEADLINE_EXCEEDED"
    assert "the smallest latency possible now is" in message


def test_r_stays_within_its_bounds(client: Any, one: Any) -> None:
    for settings in ({"r": 6}, {"min_r": 6, "max_r": 6}, {"min_r": 6, "max_r": 8, "min_quality": 0.01}):
        assert parameters(client.infer("fashion", [one], parameters=settings))["r"] in (6, settings.get("max_r", 6))


# Refusals


@pytest.mark.parametrize(
    ("settings", "field"),
    [
        ({"rr": 1}, "parameters: 'rr' is none of latency_budget_ms, "),
        ({"min_r": 1.0}, "parameters.min_r: must be an integer, and is a floating-point number"),
        ({"max_r": True}, "parameters.max_r: must be an integer, and is a boolean"),
        ({"r": 99}, "parameters.r: must lie in 0.."),
        ({"min_r": 8, "max_r": 2}, "parameters.min_r: is 8, more than max_r"),
        ({"float16_features": 1}, "parameters.float16_features: must be true or false, and is an integer"),
        ({"normalize_features": "yes"}, "parameters.normalize_features: must be true or false, and is a string"),
        ({"min_quality": "high"}, "parameters.min_quality: must be a number, and is a string"),
        ({"min_quality": 2.0}, "parameters.min_quality: must lie above 0"),
        ({"latency_budget_ms": -1}, "parameters.latency_budget_ms: must be above 0"),
        ({"latency_budget_ms": float("nan")}, "parameters.latency_budget_ms: must be above 0"),
        ({"latency_budget_ms": 1e300}, "parameters.latency_budget_ms: must be above 0"),
    ],
)
def test_a_wrong_parameter_is_named(client: Any, one: Any, settings: dict[str, Any], field: str) -> None:
    code, message = refused(lambda: client.infer("fashion", [one], parameters=settings))
    assert code == "INVALID_ARGUMENT"
    assert message.startswith(field)


def test_a_negative_timeout_is_refused(client: Any, one: Any) -> None:
    code, message = refused(lambda: client.infer("fashion", [one], timeout=-1))
    assert code == "INVALID_ARGUMENT"
    assert message.startswith("parameters.timeout: ")


def test_an_unknown_model_or_version_is_not_found(client: Any, one: Any) -> None:
    calls = {
        "nobody": lambda: client.infer("nobody", [one]),
        "nobody ": lambda: client.get_model_metadata("nobody"),
        "nobody  ": lambda: client.get_inference_statistics("nobody"),
        "fashion has no version '7' in service; version 1 is": lambda: client.infer(
            "fashion", [one], model_version="7"
        ),
        "fashion has no version '7' in service; version 1 is ": lambda: client.get_model_config("fashion", "7"),
        "no version '01' in service": lambda: client.get_model_metadata("fashion", "01"),
        "no version '2' in service": lambda: client.get_inference_statistics("fashion", "2"),
    }
    for text, call in calls.items():
        code, message = refused(call)
        assert code == "NOT_FOUND"
        assert text.strip() in message


def test_outputs_that_cannot_be_are_refused(client: Any, one: Any) -> None:
    cases = {
        "outputs: 'scores' is none of logits, ": wanted("scores"),
        "outputs: label is asked for twice": wanted("label", "label"),
        "outputs.features.parameters.classification: features can't be ranked": wanted("features", class_count=2),
        "outputs.logits.parameters.classification: must be an integer of at least 1": wanted("logits", class_count=-1),
    }
    for text, outputs in cases.items():
        code, message = refused(lambda outputs=outputs: client.infer("fashion", [one], outputs=outputs))
        assert code == "INVALID_ARGUMENT"
        assert message.startswith(text)


def test_one_bad_image_fails_its_request_and_is_named(client: Any, server: ServerProcess, files: list[Path]) -> None:
    images = [files[0].read_bytes(), b"no image", files[1].read_bytes()]
    code, message = refused(lambda: client.infer("fashion", [tensor(images, "BYTES")]))
    assert code == "INVALID_ARGUMENT"
    assert message == "image[1]: is not a JPEG, PNG, WEBP or BMP image"
    until(lambda: scrape(server.metrics_url).total("tome_requests_pending") == 0, "the other images are given up")


def test_more_images_than_the_server_holds_are_refused(client: Any) -> None:
    many = tensor(np.zeros((257, 28, 28, 3), np.uint8), "UINT8")
    code, message = refused(lambda: client.infer("fashion", [many]))
    assert code == "RESOURCE_EXHAUSTED"
    assert message == "257 images in one request; this server holds at most 256 at once"


def test_the_status_has_the_details_of_our_own_api(raw: Any) -> None:
    request = oip.ModelInferRequest(model_name="fashion", raw_input_contents=[b""])
    request.inputs.add(name="image", datatype="FP64", shape=[1, 3, 28, 28])
    assert refusal(lambda: raw.ModelInfer(request)).field == "image.datatype"


def test_the_length_of_raw_contents_may_be_told_as_kserves_client_does(raw: Any, files: list[Path]) -> None:
    data = files[0].read_bytes()
    element = len(data).to_bytes(4, "little") + data
    request = oip.ModelInferRequest(model_name="fashion", raw_input_contents=[element])
    size = request.inputs.add(name="image", datatype="BYTES", shape=[1]).parameters["binary_data_size"]
    size.int64_param = len(element)
    assert len(raw.ModelInfer(request).outputs) == 5
    for wrong in ({"int64_param": len(element) - 1}, {"string_param": str(len(element))}):
        request.inputs[0].parameters["binary_data_size"].CopyFrom(oip.InferParameter(**wrong))
        said = refusal(lambda: raw.ModelInfer(request))
        assert said.field == "inputs.parameters"
        assert "is not the length of raw_input_contents" in said.message


def test_what_the_server_does_not_have_is_unimplemented(client: Any) -> None:
    calls: dict[str, Callable[[], object]] = {
        "SystemSharedMemoryStatus": client.get_system_shared_memory_status,
        "SystemSharedMemoryRegister": lambda: client.register_system_shared_memory("a", "b", 1),
        "SystemSharedMemoryUnregister": client.unregister_system_shared_memory,
        "CudaSharedMemoryStatus": client.get_cuda_shared_memory_status,
        "CudaSharedMemoryUnregister": client.unregister_cuda_shared_memory,
        "TraceSetting": client.get_trace_settings,
        "LogSettings": client.get_log_settings,
    }
    for text, call in calls.items():
        code, message = refused(call)
        assert code == "UNIMPLEMENTED"
        assert message.startswith(text)


# Asynchronous calls and streams


def test_calls_with_callbacks_answer(client: Any, one: Any) -> None:
    answers: queue.Queue[tuple[Any, Any]] = queue.Queue()
    for i in range(5):
        client.async_infer(
            "fashion", [one], lambda result, error: answers.put((result, error)), request_id=str(i), client_timeout=60
        )
    ids = set()
    for _ in range(5):
        result, error = answers.get(timeout=60)
        assert error is None
        ids.add(result.get_response().id)
    assert ids == {"0", "1", "2", "3", "4"}


def test_a_cancelled_call_leaves_the_server(client: Any, server: ServerProcess, encoded: Any) -> None:
    cancelled = scrape(server.metrics_url).total("tome_requests_total", code="CANCELLED")
    answers: queue.Queue[tuple[Any, Any]] = queue.Queue()
    with device_held(server):
        call = client.async_infer("fashion", [encoded], lambda result, error: answers.put((result, error)))
        until(lambda: scrape(server.metrics_url).total("tome_requests_pending") == 3, "the request has arrived")
        call.cancel()
        result, error = answers.get(timeout=60)
        assert result is None
        assert error.status() == "StatusCode.CANCELLED"
        until(lambda: scrape(server.metrics_url).total("tome_requests_pending") == 0, "its images have left")
    until(
        lambda: scrape(server.metrics_url).total("tome_requests_total", code="CANCELLED") == cancelled + 1,
        "it is counted as cancelled",
    )


def test_a_stream_answers_each_request_and_outlives_a_bad_one(client: Any, one: Any, encoded: Any) -> None:
    answers: queue.Queue[tuple[Any, Any]] = queue.Queue()
    client.start_stream(lambda result, error: answers.put((result, error)), stream_timeout=100)
    for i, image in enumerate([one, encoded, one]):
        client.async_stream_infer("fashion", [image], request_id=str(i), outputs=wanted("label"))
    client.async_stream_infer("fashion", [one], request_id="bad", parameters={"r": 99})
    client.async_stream_infer("fashion", [one], request_id="last", enable_empty_final_response=True)
    results, errors = {}, []
    for _ in range(5):
        result, error = answers.get(timeout=60)
        if error is None:
            results[result.get_response().id] = result
        else:
            errors.append(error)
    client.stop_stream()
    assert set(results) == {"0", "1", "2", "last"}
    assert results["1"].as_numpy("label").shape == (3, 1)
    assert parameters(results["last"])["triton_final_response"] is True
    assert "triton_final_response" not in parameters(results["0"])
    assert [error.message().partition(":")[0] for error in errors] == ["INVALID_ARGUMENT"]


def test_an_error_in_a_stream_has_its_requests_id(raw: Any) -> None:
    [answer] = raw.ModelStreamInfer(iter([oip.ModelInferRequest(model_name="fashion", id="me")]))
    assert answer.error_message == "INVALID_ARGUMENT: inputs: must be one tensor, image; 0 are given"
    assert answer.infer_response.id == "me"


async def test_the_asyncio_client_infers_streams_and_is_refused(server: ServerProcess, one: Any) -> None:
    async with triton.aio.InferenceServerClient(server.target) as client:
        assert await client.is_server_ready()
        assert (await client.get_model_metadata("fashion")).name == "fashion"
        results = await asyncio.gather(*(client.infer("fashion", [one], client_timeout=60) for _ in range(4)))
        assert [result.as_numpy("label").tolist() for result in results] == [[[b"Ankle boot"]]] * 4
        with pytest.raises(triton.InferenceServerException, match="no model is named 'nobody'"):
            await client.infer("nobody", [one])

        async def requests() -> Any:
            for i in range(3):
                yield {"model_name": "fashion", "inputs": [one], "request_id": str(i)}

        ids = []
        async for result, error in client.stream_infer(requests()):
            assert error is None
            ids.append(result.get_response().id)
        assert sorted(ids) == ["0", "1", "2"]
