"""An error that no part of the server foresaw ends a call of any method with INTERNAL, without its text, and one line
of log with its trace."""

import asyncio
import logging
from collections.abc import AsyncIterator
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from tests.server.api.rest.wire import ask
from tests.server.scripted import Bench
from tome_api.oip import open_inference_pb2 as oip
from tome_api.oip import open_inference_pb2_grpc
from tome_api.v1 import inference_pb2 as pb
from tome_api.v1 import inference_pb2_grpc
from tome_server.api.oip.service import OpenInference
from tome_server.api.rest.server import HttpServer
from tome_server.api.rpc.server import RpcServer, RpcSettings
from tome_server.api.tokens import Tokens

SECRET = "what only the log may say"
TOKEN = "a-token-of-the-tests"
INFER = b'{"inputs": [{"name": "image", "shape": [1], "datatype": "BYTES", "data": ["YQ=="]}]}'
SAID = "the server failed; its log says why"


class Broken:
    """In the place of any part: whatever is read of it raises."""

    def __getattr__(self, name: str) -> Any:
        raise KeyError(SECRET)


class BrokenControl:
    async def load(self, _name: str) -> None:
        raise KeyError(SECRET)

    unload = load


@pytest.fixture
async def broken(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Bench]:
    with monkeypatch.context() as patch:
        patch.setattr(bench.engine, "registry", Broken())
        yield bench


@pytest.fixture
def service(broken: Bench) -> OpenInference:
    return OpenInference(broken.engine, BrokenControl())  # type: ignore[arg-type]


@pytest.fixture
async def rpc(broken: Bench, service: OpenInference) -> AsyncIterator[RpcServer]:
    server = RpcServer(broken.engine, service, RpcSettings("127.0.0.1:0", 2**20))
    await server.start()
    yield server
    await server._server.stop(None)


@pytest.fixture
async def http(service: OpenInference) -> AsyncIterator[str]:
    limits = {"max_image_bytes": 2**20, "body_memory": 2**20}
    server = HttpServer(
        service,
        "127.0.0.1:0",
        max_connections=10,
        max_connections_per_address=10,
        **limits,  # type: ignore[arg-type]
    )
    await server.start()
    yield f"http://{server.address}"
    await server.stop()


def logged_once(caplog: pytest.LogCaptureFixture) -> bool:
    lines = [record for record in caplog.records if record.levelno >= logging.WARNING]
    return len(lines) == 1 and lines[0].message == "unexpected error" and SECRET in caplog.text


CALLS = {
    "Predict": lambda stub, _: stub.Predict(pb.PredictRequest(image=b"a")),
    "ListModels": lambda stub, _: stub.ListModels(pb.ListModelsRequest()),
    "GetModel": lambda stub, _: stub.GetModel(pb.GetModelRequest()),
    "ServerReady": lambda _, stub: stub.ServerReady(oip.ServerReadyRequest()),
    "ModelReady": lambda _, stub: stub.ModelReady(oip.ModelReadyRequest()),
    "ModelMetadata": lambda _, stub: stub.ModelMetadata(oip.ModelMetadataRequest()),
    "ModelConfig": lambda _, stub: stub.ModelConfig(oip.ModelConfigRequest()),
    "ModelStatistics": lambda _, stub: stub.ModelStatistics(oip.ModelStatisticsRequest()),
    "RepositoryIndex": lambda _, stub: stub.RepositoryIndex(oip.RepositoryIndexRequest()),
    "RepositoryModelLoad": lambda _, stub: stub.RepositoryModelLoad(oip.RepositoryModelLoadRequest()),
    "RepositoryModelUnload": lambda _, stub: stub.RepositoryModelUnload(oip.RepositoryModelUnloadRequest()),
    "ModelInfer": lambda _, stub: stub.ModelInfer(oip.ModelInferRequest(model_name="first")),
}


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
async def test_any_method_over_grpc(call: Any, rpc: RpcServer, caplog: pytest.LogCaptureFixture) -> None:
    async with grpc.aio.insecure_channel(rpc.address) as channel:
        stubs = inference_pb2_grpc.InferenceStub(channel), open_inference_pb2_grpc.GRPCInferenceServiceStub(channel)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await call(*stubs)
    assert (caught.value.code(), caught.value.details()) == (grpc.StatusCode.INTERNAL, SAID)
    assert logged_once(caplog)


async def test_a_message_of_a_stream(rpc: RpcServer, caplog: pytest.LogCaptureFixture) -> None:
    async with grpc.aio.insecure_channel(rpc.address) as channel:
        messages = [pb.PredictStreamRequest(request=pb.PredictRequest(image=b"a"))]
        [answer] = [each async for each in inference_pb2_grpc.InferenceStub(channel).PredictStream(iter(messages))]
        assert (answer.error.code, answer.error.message) == (grpc.StatusCode.INTERNAL.value[0], SAID)
        assert logged_once(caplog)
        caplog.clear()
        other = open_inference_pb2_grpc.GRPCInferenceServiceStub(channel)
        [said] = [each async for each in other.ModelStreamInfer(iter([oip.ModelInferRequest(model_name="first")]))]
        assert said.error_message == f"INTERNAL: {SAID}"
        assert logged_once(caplog)


@pytest.mark.parametrize("method", ["Check", "Watch"])
async def test_health(
    method: str, rpc: RpcServer, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rpc._health, "_services", Broken())
    async with grpc.aio.insecure_channel(rpc.address) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        call = getattr(stub, method)(health_pb2.HealthCheckRequest())
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await (call if method == "Check" else call.read())
    assert (caught.value.code(), caught.value.details()) == (grpc.StatusCode.INTERNAL, SAID)
    lines = [record for record in caplog.records if record.levelno >= logging.WARNING]
    assert [line.message for line in lines] == ["unexpected error"]
    assert lines[0].exc_info is not None


async def test_what_looks_at_tokens(
    broken: Bench,
    service: OpenInference,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Any,
) -> None:
    (tmp_path / "tokens").write_text(TOKEN)
    tokens = Tokens(tmp_path / "tokens")
    server = RpcServer(broken.engine, service, RpcSettings("127.0.0.1:0", 2**20, tokens=tokens))
    await server.start()
    monkeypatch.setattr(tokens, "_digests", Broken())
    try:
        async with grpc.aio.insecure_channel(server.address) as channel:
            stub = inference_pb2_grpc.InferenceStub(channel)
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await stub.ListModels(pb.ListModelsRequest(), metadata=[("authorization", f"Bearer {TOKEN}")])
    finally:
        await server._server.stop(None)
    assert (caught.value.code(), caught.value.details()) == (grpc.StatusCode.INTERNAL, SAID)
    lines = [record for record in caplog.records if record.levelno >= logging.WARNING]
    assert [line.message for line in lines] == ["unexpected error"]


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v2/health/ready", None),
        ("/v2/models/first", None),
        ("/v2/models/first/ready", None),
        ("/v2/models/first/config", None),
        ("/v2/models/first/stats", None),
        ("/v2/models/stats", None),
        ("/v2/repository/index", b""),
        ("/v2/repository/models/first/load", b""),
        ("/v2/repository/models/first/unload", b""),
        (
            "/v2/models/first/infer",
            b'{"inputs": [{"name": "image", "shape": [1], "datatype": "BYTES", "data": ["YQ=="]}]}',
        ),
    ],
)
async def test_any_path_over_http(path: str, body: bytes | None, http: str, caplog: pytest.LogCaptureFixture) -> None:
    answer = await asyncio.to_thread(ask, http, path, body)
    assert answer.status == 500
    assert answer.json == {"error": SAID, "code": "INTERNAL"}
    assert logged_once(caplog)


async def test_metrics_over_http(
    http: str, broken: Bench, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: object) -> None:
        raise KeyError(SECRET)

    monkeypatch.setattr(type(broken.engine.metrics), "exposition", fails)
    answer = await asyncio.to_thread(ask, http, "/metrics")
    assert (answer.status, answer.json["error"]) == (500, SAID)
    assert logged_once(caplog)
