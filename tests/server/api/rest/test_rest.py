"""The Open Inference Protocol over HTTP: with Triton's own client, and as curl and load balancers speak it."""

import asyncio
import base64
import json
import struct
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tritonclient.http
import tritonclient.http.aio
import yaml
from PIL import Image
from tritonclient.utils import InferenceServerException

from tests.server.api.rest.wire import INFER, JSON_LENGTH, Answer, ask, connect, images, infer, outputs
from tests.server.api.rpc.wire import connected, device_held, scrape, until
from tests.server_process import ServerProcess
from tome_api.v1 import inference_pb2 as pb

TOKEN = "a-token-of-the-tests"
NAMES = ["logits", "probabilities", "class_id", "label", "features"]


@pytest.fixture(scope="module")
def base(server: ServerProcess) -> str:
    return str(server.metrics_url.removesuffix("/metrics"))


@pytest.fixture(scope="module")
def files(samples: dict[Path, str]) -> list[Path]:
    return sorted(samples)[:3]


@pytest.fixture(scope="module")
def rgb(files: list[Path]) -> np.ndarray:
    """[3, 28, 28, 3] uint8: the same samples' pixels."""
    return np.stack([np.asarray(Image.open(file).convert("RGB")) for file in files])


@pytest.fixture(scope="module")
def client(base: str) -> Iterator[Any]:
    with tritonclient.http.InferenceServerClient(base.removeprefix("http://")) as connected:
        yield connected


def tensor(data: list[bytes]) -> Any:
    made = tritonclient.http.InferInput("image", [len(data)], "BYTES")
    return made.set_data_from_numpy(np.array(data, object))


@pytest.fixture(scope="module")
def encoded(files: list[Path]) -> Any:
    return tensor([file.read_bytes() for file in files])


def refused(call: Callable[[], object]) -> tuple[str, str]:
    with pytest.raises(InferenceServerException) as caught:
        call()
    return caught.value.status(), caught.value.message()


# Triton's client


def test_tritons_client_finds_server_and_model(client: Any) -> None:
    assert client.is_server_live()
    assert client.is_server_ready()
    assert client.is_model_ready("fashion")
    assert client.is_model_ready("fashion", "1")
    assert not client.is_model_ready("nobody")
    assert client.get_server_metadata()["name"] == "tome-serving"
    metadata = client.get_model_metadata("fashion", "1")
    assert metadata["inputs"] == [{"name": "image", "datatype": "FP32", "shape": [-1, 3, 28, 28]}]
    assert [output["name"] for output in metadata["outputs"]] == NAMES
    config = client.get_model_config("fashion")
    assert config["input"][0]["dims"] == [3, 28, 28]
    assert config["max_batch_size"] == 8
    [indexed] = client.get_model_repository_index()
    assert (indexed["name"], indexed["state"]) == ("fashion", "READY")


def test_tritons_client_infers_with_binary_and_json_outputs(client: Any, encoded: Any, files: list[Path]) -> None:
    wanted = [
        tritonclient.http.InferRequestedOutput("probabilities", class_count=2),
        tritonclient.http.InferRequestedOutput("label"),
        tritonclient.http.InferRequestedOutput("class_id", binary_data=False),
    ]
    settings = {"r": 4, "latency_budget_ms": 50_000}
    result = client.infer("fashion", [encoded], outputs=wanted, request_id="me", parameters=settings)
    assert result.get_response()["id"] == "me"
    assert result.get_response()["parameters"]["r"] == 4
    assert result.as_numpy("label").ravel().tolist()[0] == b"Ankle boot"
    ranked = result.as_numpy("probabilities")
    assert ranked.shape == (3, 2)
    assert [int(row[0].split(b":")[1]) for row in ranked] == result.as_numpy("class_id").ravel().tolist()
    everything = client.infer("fashion", [encoded])
    assert everything.as_numpy("logits").shape == (3, 10)
    assert everything.as_numpy("features").shape == (3, 128)


def test_tritons_client_gets_features_halved_and_those_of_patches(client: Any, encoded: Any) -> None:
    names = ("features", "patch_features", "token_map")
    wanted = [tritonclient.http.InferRequestedOutput(name) for name in names]
    settings = {"r": 0, "normalize_features": True}
    full = client.infer("fashion", [encoded], outputs=wanted, parameters=settings)
    half = client.infer("fashion", [encoded], outputs=wanted, parameters={**settings, "float16_features": True})
    for name, shape in (("features", (3, 128)), ("patch_features", (3, 196, 128))):
        assert (half.as_numpy(name).dtype, half.as_numpy(name).shape) == (np.float16, shape)
        assert half.as_numpy(name).astype(np.float32) == pytest.approx(full.as_numpy(name), abs=2e-3)
        assert np.linalg.norm(full.as_numpy(name), axis=-1) == pytest.approx(1, abs=1e-5)
    assert half.as_numpy("token_map").dtype == np.int32
    assert half.as_numpy("token_map").tolist() == [list(range(1, 197))] * 3


def test_float16_in_json_is_refused_with_the_way_to_it(base: str, files: list[Path]) -> None:
    image = base64.b64encode(files[0].read_bytes()).decode()
    message = images([image], "BYTES", [1], content_type="base64")
    message |= {"parameters": {"float16_features": True}, "outputs": [{"name": "patch_features"}]}
    answer = infer(base, message)
    assert answer.status == 400
    assert answer.error.startswith("parameters.float16_features: patch_features can't come as FP16 here")
    assert "over HTTP if the output is asked for by binary_data" in answer.error
    message["outputs"] = [{"name": "patch_features", "parameters": {"binary_data": True}}]
    answer = infer(base, message)
    assert answer.status == 200
    described = json.loads(answer.body[: int(answer.headers[JSON_LENGTH.lower()])])["outputs"][0]
    assert (described["datatype"], described["shape"]) == ("FP16", [1, 196, 128])
    assert described["parameters"]["binary_data_size"] == 2 * 196 * 128


def test_patches_in_json_are_numbers(base: str, files: list[Path]) -> None:
    image = base64.b64encode(files[0].read_bytes()).decode()
    message = images([image], "BYTES", [1], content_type="base64")
    message |= {"parameters": {"r": 0}, "outputs": [{"name": "token_map"}, {"name": "patch_features"}]}
    found = outputs(infer(base, message))
    assert found["token_map"] == list(range(1, 197))
    assert len(found["patch_features"]) == 196 * 128


def test_tritons_client_sees_statistics_move(client: Any, encoded: Any) -> None:
    before = client.get_inference_statistics("fashion")["model_stats"][0]
    client.infer("fashion", [encoded])
    after = client.get_inference_statistics()["model_stats"][0]
    assert after["inference_count"] - before["inference_count"] == 3


def test_tritons_client_is_told_what_is_wrong(client: Any, encoded: Any) -> None:
    code, message = refused(lambda: client.infer("fashion", [encoded], parameters={"rr": 1}))
    assert (code, message.partition(" is none of")[0]) == ("400", "parameters: 'rr'")
    code, message = refused(lambda: client.infer("nobody", [encoded]))
    assert (code, message) == ("404", "no model is named 'nobody'; this server hosts fashion")
    code, message = refused(lambda: client.infer("fashion", [encoded], timeout=1))
    assert code == "504"
    assert "the smallest latency possible now is" in message
    for call in (client.get_trace_settings, client.get_log_settings, client.get_system_shared_memory_status,
                 client.get_cuda_shared_memory_status):  # fmt: skip
        assert refused(call)[0] == "501"


async def test_tritons_asyncio_client_infers(base: str, encoded: Any) -> None:
    async with tritonclient.http.aio.InferenceServerClient(base.removeprefix("http://")) as client:
        assert await client.is_server_ready()
        results = await asyncio.gather(*(client.infer("fashion", [encoded]) for _ in range(3)))
        assert {result.as_numpy("label")[0, 0] for result in results} == {b"Ankle boot"}


# As any client


def test_all_ways_to_write_images_down_get_the_answer_of_our_own_api(
    base: str, server: ServerProcess, files: list[Path], rgb: np.ndarray
) -> None:
    with connected(server.target) as stub:
        own = [stub.Predict(pb.PredictRequest(image=file.read_bytes(), r=4, top_k=10)) for file in files]
        settings = stub.GetModel(pb.GetModelRequest()).model.input
    mean, std = (np.array(one, np.float32) for one in (settings.mean, settings.std))
    ready_made = ((rgb / np.float32(255) - mean) / std).transpose(0, 3, 1, 2)
    texts = [base64.b64encode(file.read_bytes()).decode() for file in files]
    messages = [
        images(texts, "BYTES", [3], content_type="base64"),
        images([[text] for text in texts], "BYTES", [3, 1], content_type="base64"),
        images(rgb.tolist(), "UINT8", [*rgb.shape]),
        images(rgb.ravel().tolist(), "UINT8", [*rgb.shape]),
        images(ready_made.tolist(), "FP32", [*ready_made.shape]),
    ]
    for message in messages:
        found = outputs(infer(base, {**message, "parameters": {"r": 4}}))
        assert list(found) == NAMES
        assert found["class_id"] == [reply.predictions[0].class_id for reply in own]
        assert found["label"] == [reply.predictions[0].label for reply in own]
        for row, reply in zip(np.reshape(found["probabilities"], (3, 10)), own, strict=True):
            assert {p.class_id: row[p.class_id] for p in reply.predictions} == pytest.approx(
                {p.class_id: p.score for p in reply.predictions}, abs=1e-4
            )


def test_a_file_alone_is_a_request(base: str, files: list[Path]) -> None:
    answer = ask(base, INFER, files[0].read_bytes(), {JSON_LENGTH: "0"})
    assert outputs(answer)["label"] == ["Ankle boot"]
    assert answer.headers["content-type"] == "application/json"
    assert set(answer.json["parameters"]) == {
        "r", "tokens_in", "tokens_out", "flops", "flops_saved", "queue_us", "compute_us", "slack_us",
    }  # fmt: skip


def test_binary_tensors_follow_the_json_both_ways(base: str, rgb: np.ndarray) -> None:
    parameters = {"binary_data_size": rgb.nbytes}
    message = {
        "inputs": [{"name": "image", "datatype": "UINT8", "shape": [*rgb.shape], "parameters": parameters}],
        "outputs": [{"name": "label"}, {"name": "class_id", "parameters": {"binary_data": False}}],
        "parameters": {"binary_data_output": True},
    }
    text = json.dumps(message).encode()
    answer = ask(base, INFER, text + rgb.tobytes(), {JSON_LENGTH: str(len(text))})
    assert answer.status == 200, answer.body
    assert answer.headers["content-type"] == "application/octet-stream"
    length = int(answer.headers[JSON_LENGTH.lower()])
    label, class_id = json.loads(answer.body[:length])["outputs"]
    assert class_id["data"][0] == 9
    behind = answer.body[length:]
    assert label["parameters"]["binary_data_size"] == len(behind)
    assert behind[: 4 + 10] == struct.pack("<I", 10) + b"Ankle boot"


def test_the_deadline_is_the_least_of_header_and_parameters(base: str, files: list[Path]) -> None:
    image = base64.b64encode(files[0].read_bytes()).decode()
    message = images([image], "BYTES", [1], content_type="base64")

    def slack(headers: dict[str, str], **parameters: float) -> float:
        answer = infer(base, {**message, "parameters": parameters}, headers)
        return float(answer.json["parameters"]["slack_us"])

    assert slack({}) > 50e6  # the server's default is a minute
    assert slack({"X-Request-Timeout-Ms": "20000"}) < 20e6
    assert slack({"X-Request-Timeout-Ms": "20000"}, latency_budget_ms=10_000) < 10e6
    assert slack({"X-Request-Timeout-Ms": "10000.5"}, timeout=20_000_000) < 10_000_500
    late = infer(base, message, {"X-Request-Timeout-Ms": "0.01"})
    assert late.status == 504
    assert late.json["code"] == "DEADLINE_EXCEEDED"
    assert late.json["smallest_latency_ms"] >= 1
    for wrong in ("soon", "0", "-1", "nan", "1e300"):
        refused = infer(base, message, {"X-Request-Timeout-Ms": wrong})
        assert refused.status == 400
        must = "a number of milliseconds, not 'soon'" if wrong == "soon" else "above 0"
        assert refused.error.startswith(f"X-Request-Timeout-Ms: must be {must}")


GOOD: dict[str, Any] = images([0] * (28 * 28 * 3), "UINT8", [1, 28, 28, 3])
INPUT = GOOD["inputs"][0]


@pytest.mark.parametrize(
    ("message", "text"),
    [
        ([], "request: "),
        ({}, "inputs: "),
        ({"inputs": []}, "inputs: must be one tensor, image; 0 are given"),
        ({"inputs": [INPUT, INPUT]}, "inputs: must be one tensor, image; 2 are given"),
        ({**GOOD, "extra": 1}, "extra: "),
        ({**GOOD, "model_name": "other"}, "model_name: is 'other', and the path says 'fashion'"),
        ({**GOOD, "parameters": {"r": None}}, "parameters.r"),
        ({**GOOD, "parameters": {"r": 2.5}}, "parameters.r: must be an integer, and is a floating-point number"),
        ({**GOOD, "parameters": {"binary_data_output": 1}}, "parameters: binary_data_output must be true or false"),
        ({**GOOD, "outputs": [{"name": "label", "parameters": {"binary_data": "no"}}]}, "outputs.'label': binary_data"),
        ({**GOOD, "outputs": [{"name": "scores"}]}, "outputs: 'scores' is none of logits, "),
        ({"inputs": [{**INPUT, "name": "picture"}]}, "inputs: the only input is called image, not 'picture'"),
        ({"inputs": [{**INPUT, "datatype": "FP16"}]}, "image.datatype: must be FP32, UINT8 or BYTES, not 'FP16'"),
        ({"inputs": [{**INPUT, "shape": [1, 28, 28, 1]}]}, "inputs.data: is of shape [2352]; the shape says [1, 28, "),
        ({"inputs": [{**INPUT, "shape": [2352]}]}, "image.shape: must be [N, height, width, 3] for UINT8"),
        ({"inputs": [{**INPUT, "shape": [1, 28, "28", 3]}]}, "inputs.0.shape.2: "),
        ({"inputs": [{**INPUT, "data": [[1, 2], [3]]}]}, "inputs.data: is neither one list nor nested like the shape"),
        ({"inputs": [{**INPUT, "data": [0.5] * 2352}]}, "inputs.data: of UINT8 must be numbers of that type"),
        ({"inputs": [{**INPUT, "data": [256] * 2352}]}, "inputs.data: of UINT8 must lie in 0..255"),
        ({"inputs": [{**INPUT, "data": ["1"] * 2352}]}, "inputs.data: of UINT8 must be numbers of that type"),
        ({"inputs": [{**INPUT, "data": None}]}, "inputs.data: is missing; send it, or binary_data_size and binary"),
        ({"inputs": [{**INPUT, "parameters": {"binary_data_size": 5}}]}, "inputs.parameters: binary_data_size is 5, "),
        ({"inputs": [{**INPUT, "parameters": {"other": 5}}]}, "inputs.parameters: 'other' is not supported"),
        ({"inputs": [{**INPUT, "parameters": {"content_type": "base64"}}]}, "inputs.parameters: content_type can be"),
        (images([1], "BYTES", [1]), "inputs.data: of BYTES must be a list of strings"),
        (images(["no image"], "BYTES", [1]), "image: is not a JPEG, PNG, WEBP or BMP image"),
        (images(["?"], "BYTES", [1], content_type="base64"), "inputs.data: is not base64"),
        (images(["a", "b"], "BYTES", [3]), "image: has 2 elements; its shape says 3"),
        (images([1e39] * 2352, "FP32", [1, 3, 28, 28]), "image: holds NaN or infinity"),
    ],
)
def test_a_request_that_cannot_be_right_is_400_and_says_why(base: str, message: Any, text: str) -> None:
    answer = infer(base, message)
    assert answer.status == 400
    assert answer.error.startswith(text), answer.error
    assert answer.json["code"] == "INVALID_ARGUMENT"


def test_outputs_that_overflow_are_400_in_json_and_come_as_bytes(base: str, server: ServerProcess) -> None:
    huge = images([0.0] * 2352 + [3e38] * 2352, "FP32", [2, 3, 28, 28])
    for names in ((), ("logits",), ("label", "probabilities"), ("features",)):
        answer = infer(base, {**huge, "outputs": [{"name": name} for name in names]})
        assert (answer.status, answer.json["code"]) == (400, "INVALID_ARGUMENT")
        assert f"outputs.{names[-1] if names else 'logits'}: of image 1 holds infinities or NaN" in answer.error
        assert "ask for it by binary_data" in answer.error
    found = outputs(infer(base, {**huge, "outputs": [{"name": "class_id"}, {"name": "label"}]}))
    assert [len(values) for values in found.values()] == [2, 2]
    answer = infer(base, {**huge, "parameters": {"binary_data_output": True, "normalize_features": True}})
    assert answer.status == 200
    log = server.log.read_text()
    assert "RuntimeWarning" not in log
    assert "Out of range" not in log


def test_the_models_name_may_be_repeated_in_the_body_as_kserves_client_does(base: str) -> None:
    assert infer(base, {**GOOD, "model_name": "fashion"}).status == 200


def test_bodies_and_headers_that_cannot_be_right_are_400(base: str) -> None:
    body = json.dumps(GOOD).encode()
    cases: dict[str, tuple[bytes, dict[str, str]]] = {
        "request: is not JSON: ": (b"{", {}),
        "request: is not JSON: \x20": (b"", {}),
        "request: is not JSON:": (b"[" * 10_000, {}),
        "request: is not JSON: Expecting": (b"\xff\xfe", {}),
        "request: is not JSON; an encoded image alone goes with the header ": (b"\x89PNG", {}),
        f"{JSON_LENGTH}: must lie in 0..": (body, {JSON_LENGTH: str(len(body) + 1)}),
        f"{JSON_LENGTH}: must be a number of bytes, not '-1'": (body, {JSON_LENGTH: "-1"}),
        f"{JSON_LENGTH}: must be a number of bytes, not 'many'": (body, {JSON_LENGTH: "many"}),
        "inputs.parameters: binary_data_size is 0, and 3 bytes follow": (body + b"abc", {JSON_LENGTH: str(len(body))}),
        "image: is empty": (b"", {JSON_LENGTH: "0"}),
    }
    for text, (sent, headers) in cases.items():
        answer = ask(base, INFER, sent, headers)
        assert (answer.status, answer.error[: len(text.strip())]) == (400, text.strip())


def test_what_is_too_large_is_413(base: str) -> None:
    length = str(9 * 2**20)
    cases = [
        ask(base, INFER, b" " * (9 * 2**20), {JSON_LENGTH: length}),
        ask(base, INFER, bytes(33 * 2**20), {JSON_LENGTH: "0"}),
        infer(base, images([0] * 257 * 3, "UINT8", [257, 1, 1, 3])),
    ]
    assert [answer.status for answer in cases] == [413] * 3
    assert [answer.json["code"] for answer in cases] == ["RESOURCE_EXHAUSTED"] * 3
    assert "retry-after" not in cases[0].headers


def test_paths_and_methods_that_are_not_there(base: str) -> None:
    for path in ("/v2/models/nobody", "/v2/models/nobody/ready", "/v2/models/fashion/versions/2", "/v3", "/v2/other"):
        answer = ask(base, path)
        assert answer.status == 404
        assert answer.error
    assert ask(base, "/v2/models/nobody/infer", json.dumps(GOOD).encode()).status == 404
    refused = infer(base, GOOD, path="/v2/models/fashion/versions/2/infer")
    assert (refused.status, refused.json["code"]) == (404, "NOT_FOUND")
    assert refused.error == "fashion has no version '2' in service; version 1 is"
    assert infer(base, GOOD, path="/v2/models/fashion/versions/1/infer").json["model_version"] == "1"
    assert ask(base, INFER).status == 405
    assert ask(base, "/v2/repository/models/fashion/load", b"").status == 501


def test_health_and_descriptions_are_json(base: str) -> None:
    assert ask(base, "/v2/health/live").json == {"live": True}
    assert ask(base, "/v2/health/ready").json == {"ready": True}
    assert ask(base, "/v2/models/fashion/ready").json == {"name": "fashion", "ready": True}
    assert ask(base, "/v2").json["name"] == "tome-serving"
    assert [one["name"] for one in ask(base, "/v2/repository/index", b'{"ready": true}').json] == ["fashion"]


def test_metrics_come_as_the_scraper_likes_them(base: str) -> None:
    plain = ask(base, "/metrics")
    assert plain.headers["content-type"].startswith("text/plain; version=0.0.4")
    modern = ask(base, "/metrics", headers={"Accept": "application/openmetrics-text; version=1.0.0"})
    assert modern.headers["content-type"].startswith("application/openmetrics-text; version=1.0.0")
    assert modern.body.endswith(b"# EOF\n")


def test_an_answer_is_counted_like_one_over_grpc(base: str, server: ServerProcess) -> None:
    def counts() -> list[float]:
        metrics = scrape(server.metrics_url)
        return [metrics.total("tome_requests_total", model="fashion", code=code) for code in ("OK", "INVALID_ARGUMENT")]

    before = counts()
    infer(base, GOOD)
    infer(base, {"inputs": []})
    assert [now - then for now, then in zip(counts(), before, strict=True)] == [1, 1]


def test_a_client_that_goes_takes_its_request_along(base: str, server: ServerProcess, files: list[Path]) -> None:
    cancelled = scrape(server.metrics_url).total("tome_requests_total", code="CANCELLED")
    image = base64.b64encode(files[0].read_bytes()).decode()
    body = json.dumps(images([image] * 8, "BYTES", [8], content_type="base64")).encode()
    with device_held(server):
        connection = connect(base)
        connection.request("POST", INFER, body)
        until(lambda: scrape(server.metrics_url).total("tome_requests_pending") == 8, "the request has arrived")
        connection.close()
        until(lambda: scrape(server.metrics_url).total("tome_requests_pending") == 0, "its images have left")
        until(
            lambda: scrape(server.metrics_url).total("tome_requests_total", code="CANCELLED") == cancelled + 1,
            "it is counted as cancelled",
        )


def test_a_client_that_goes_before_its_body_came_is_forgotten(base: str, server: ServerProcess) -> None:
    cancelled = scrape(server.metrics_url).total("tome_requests_total", code="CANCELLED")
    connection = connect(base)
    connection.putrequest("POST", INFER)
    connection.putheader("Content-Length", "1000")
    connection.endheaders(b"half")
    connection.close()
    until(
        lambda: scrape(server.metrics_url).total("tome_requests_total", code="CANCELLED") == cancelled + 1, "it is gone"
    )


# A server of its own


def test_tokens_a_full_queue_and_draining(own_server: Callable[..., ServerProcess], tmp_path: Path) -> None:
    (tmp_path / "tokens").write_text(f"{TOKEN}\n")
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump({"auth": {"tokens": str(tmp_path / "tokens")}, "batching": {"max_pending": 1}}))
    server = own_server("--config", str(config), "--default-budget", "60s", "--dtype", "float32")
    base = server.metrics_url.removesuffix("/metrics")
    allowed = {"Authorization": f"Bearer {TOKEN}"}

    assert ask(base, "/v2/health/ready").status == 200
    assert ask(base, "/metrics").status == 200
    for headers in ({}, {"Authorization": "Bearer another-token-of-nobody"}):
        refused = infer(base, GOOD, headers)
        assert refused.status == 401
        assert refused.headers["www-authenticate"] == "Bearer"
        assert ask(base, "/v2/models/fashion", headers=headers).status == 401
    assert infer(base, GOOD, allowed).status == 200

    waited: list[Answer] = []

    @contextmanager
    def waiting() -> Iterator[None]:
        """Have a request in the server meanwhile, which is answered then."""
        sender = threading.Thread(target=lambda: waited.append(infer(base, GOOD, allowed)))
        with device_held(server):
            sender.start()
            until(lambda: scrape(server.metrics_url).total("tome_requests_pending") == 1, "the request has arrived")
            yield
        sender.join()
        assert waited[-1].status == 200

    with waiting():
        full = infer(base, GOOD, allowed)
        assert (full.status, full.json["code"]) == (429, "RESOURCE_EXHAUSTED")
        assert full.headers["retry-after"] == "1"

    with waiting():
        server.process.terminate()
        until(lambda: ask(base, "/v2/health/ready").status == 503, "the server drains")
        assert infer(base, GOOD, allowed).status == 503
        assert ask(base, "/v2/health/live").status == 200
    assert server.process.wait(60) == 0
