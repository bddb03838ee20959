"""Who may call, through a real channel to a server that asks for tokens."""

import asyncio
import gc
import hashlib
import json
import queue
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import grpc
import pytest
import yaml
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from tests.server.api.rpc.collector import Collector, collecting
from tests.server.api.rpc.wire import (
    PATIENCE,
    device_held,
    exemplars,
    openmetrics,
    refusal,
    refusal_in,
    refusal_of,
    scrape,
    until,
)
from tests.server_process import ServerProcess
from tome_api.v1 import inference_pb2 as pb
from tome_api.v1 import inference_pb2_grpc
from tome_client import Client, TomeError
from tome_server.api.rpc.access import AccessInterceptor
from tome_server.api.rpc.server import RpcSettings, server_options
from tome_server.api.tokens import Tokens
from tome_server.observability.metrics import Metrics as ServerMetrics

ALICE, BOB, EVE = "alice-0123456789abcdef", "bob-0123456789abcdef", "eve-0123456789abcdef"
NOT_FOUND = grpc.StatusCode.NOT_FOUND
UNAUTHENTICATED = grpc.StatusCode.UNAUTHENTICATED
DEADLINE_EXCEEDED = grpc.StatusCode.DEADLINE_EXCEEDED


@pytest.fixture(scope="module")
def tokens(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("secrets") / "tokens"
    file.write_text(f"{ALICE}\n{BOB}\n")
    return file


@pytest.fixture(scope="module")
def collector() -> Iterator[Collector]:
    with collecting() as collector:
        yield collector


@pytest.fixture(scope="module")
def guarded(module_server: Callable[..., ServerProcess], tokens: Path, collector: Collector) -> ServerProcess:
    """A server that asks for tokens, and tells all it can."""
    config = tokens.parent / "server.yaml"
    settings = {
        "auth": {"tokens": str(tokens)},
        "limits": {"max_client_requests": 3},
        "connections": {"max_concurrent_streams": 7},
        "reflection": False,
        "traces": collector.endpoint,
    }
    config.write_text(yaml.safe_dump(settings))
    flags = ("--default-budget", "60s", "--dtype", "float32", "--log-level", "debug")
    return module_server("--config", str(config), *flags)


@pytest.fixture(scope="module")
def channel(guarded: ServerProcess) -> Iterator[grpc.Channel]:
    with grpc.insecure_channel(guarded.target) as channel:
        yield channel


def bearer(token: str) -> tuple[tuple[str, str], ...]:
    return (("authorization", f"Bearer {token}"),)


def calls(channel: grpc.Channel, request: pb.PredictRequest, metadata: Any) -> dict[str, Callable[[], object]]:
    """A call of every method, streams of both directions included."""
    stub = inference_pb2_grpc.InferenceStub(channel)
    stream = [pb.PredictStreamRequest(id="1", request=request)]
    return {
        "Predict": lambda: stub.Predict(request, metadata=metadata, timeout=PATIENCE),
        "PredictStream": lambda: list(stub.PredictStream(iter(stream), metadata=metadata, timeout=PATIENCE)),
        "ListModels": lambda: stub.ListModels(pb.ListModelsRequest(), metadata=metadata, timeout=PATIENCE),
        "GetModel": lambda: stub.GetModel(pb.GetModelRequest(), metadata=metadata, timeout=PATIENCE),
    }


@pytest.mark.parametrize("method", ["Predict", "PredictStream", "ListModels", "GetModel"])
def test_every_method_takes_calls_with_a_token_and_no_others(
    guarded: ServerProcess, channel: grpc.Channel, good: pb.PredictRequest, method: str
) -> None:
    counted = scrape(guarded.metrics_url).total("tome_requests_total", code="UNAUTHENTICATED")
    strangers = [(), bearer(EVE), bearer(""), (("authorization", ALICE),), (*bearer(ALICE), *bearer(BOB))]
    for metadata in strangers:
        refused = refusal(calls(channel, good, metadata)[method])
        assert refused.code is UNAUTHENTICATED
        assert refused.message == "send metadata `authorization: Bearer TOKEN` with a known token"
    now = scrape(guarded.metrics_url).total("tome_requests_total", code="UNAUTHENTICATED")
    assert now == counted + len(strangers)
    for token in (ALICE, BOB):
        assert calls(channel, good, bearer(token))[method]()


def test_the_client_library_sends_its_token(guarded: ServerProcess, good: pb.PredictRequest) -> None:
    for health_checks in (False, True):
        with Client(guarded.target, token=ALICE, health_checks=health_checks) as client:
            assert client.predict(good.image).predictions
    with Client(guarded.target, token=EVE) as client, pytest.raises(TomeError, match="UNAUTHENTICATED"):
        client.predict(good.image)


def test_a_stream_that_sends_nothing_is_refused_all_the_same(channel: grpc.Channel) -> None:
    outgoing: queue.SimpleQueue[pb.PredictStreamRequest | None] = queue.SimpleQueue()
    call = inference_pb2_grpc.InferenceStub(channel).PredictStream(iter(outgoing.get, None), timeout=PATIENCE)
    assert refusal(lambda: list(call)).code is UNAUTHENTICATED
    outgoing.put(None)


def test_a_method_that_is_not_there_is_told_apart_only_by_who_may_call(channel: grpc.Channel) -> None:
    unknown = channel.unary_unary("/tome_api.v1.Inference/Nothing")
    assert refusal(lambda: unknown(b"", timeout=PATIENCE)).code is UNAUTHENTICATED
    known = refusal(lambda: unknown(b"", metadata=bearer(ALICE), timeout=PATIENCE))
    assert known.code is grpc.StatusCode.UNIMPLEMENTED


def test_health_needs_no_token(channel: grpc.Channel) -> None:
    health = health_pb2_grpc.HealthStub(channel)
    assert health.Check(health_pb2.HealthCheckRequest()).status == health_pb2.HealthCheckResponse.SERVING
    assert next(health.Watch(health_pb2.HealthCheckRequest())).status == health_pb2.HealthCheckResponse.SERVING


def test_reflection_can_be_switched_off(channel: grpc.Channel) -> None:
    stub = reflection_pb2_grpc.ServerReflectionStub(channel)
    question = reflection_pb2.ServerReflectionRequest(list_services="")
    refused = refusal(lambda: next(stub.ServerReflectionInfo(iter([question]), metadata=bearer(ALICE))))
    assert refused.code is grpc.StatusCode.UNIMPLEMENTED


def test_tokens_exchanged_under_a_running_server_hold_from_the_next_call_on(
    guarded: ServerProcess, channel: grpc.Channel, good: pb.PredictRequest, tokens: Path
) -> None:
    predict = inference_pb2_grpc.InferenceStub(channel).Predict
    assert refusal(lambda: predict(good, metadata=bearer(EVE))).code is UNAUTHENTICATED
    kept = tokens.read_text()
    tokens.write_text(f"{ALICE}\n{EVE}\n")
    assert predict(good, metadata=bearer(EVE)).predictions
    assert predict(good, metadata=bearer(ALICE)).predictions
    assert refusal(lambda: predict(good, metadata=bearer(BOB))).code is UNAUTHENTICATED
    tokens.write_text(kept)
    assert refusal(lambda: predict(good, metadata=bearer(EVE))).code is UNAUTHENTICATED


# REST


def rest(guarded: ServerProcess, path: str, body: bytes | None = None, **headers: str) -> tuple[int, bytes]:
    """Ask over HTTP; returns status and body."""
    url = guarded.metrics_url.removesuffix("/metrics") + path
    try:
        with urlopen(Request(url, body, headers), timeout=PATIENCE) as response:
            return response.status, response.read()
    except HTTPError as error:
        return error.code, error.read()


def test_rest_takes_the_same_tokens(guarded: ServerProcess, good: pb.PredictRequest) -> None:
    infer = ("/v2/models/fashion/infer", good.image)
    binary = {"Inference-Header-Content-Length": "0", "Content-Type": "application/octet-stream"}
    for path, body in (infer, ("/v2", None), ("/v2/models/fashion", None)):
        for given in ({}, {"Authorization": f"Bearer {EVE}"}, {"Authorization": ALICE}):
            assert rest(guarded, path, body, **binary, **given)[0] == 401
        assert rest(guarded, path, body, **binary, Authorization=f"Bearer {ALICE}")[0] == 200
    assert rest(guarded, "/v2/health/live")[0] == 200
    assert rest(guarded, "/metrics")[0] == 200


@pytest.mark.parametrize(
    "path", ["/v2/health/../models/fashion", "//v2/models/fashion", "/V2/models/fashion", "/v2%2Fmodels/fashion"]
)
def test_no_other_spelling_of_a_path_goes_past_the_tokens(guarded: ServerProcess, path: str) -> None:
    assert rest(guarded, path)[0] in (401, 404)


# Traces


def test_each_message_is_a_span_of_its_callers_trace(
    guarded: ServerProcess, channel: grpc.Channel, good: pb.PredictRequest, collector: Collector
) -> None:
    trace, parent = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
    metadata = (*bearer(ALICE), ("traceparent", f"00-{trace}-{parent}-01"))
    stub = inference_pb2_grpc.InferenceStub(channel)
    stub.Predict(good, metadata=metadata)
    assert len(list(stub.PredictStream(iter([pb.PredictStreamRequest(request=good)]), metadata=metadata))) == 1
    headers = {"Inference-Header-Content-Length": "0", **{key: str(value) for key, value in metadata}}
    assert rest(guarded, "/v2/models/fashion/infer", good.image, **headers)[0] == 200
    until(lambda: len([span for span in collector.spans if span.trace_id.hex() == trace]) == 12, "the spans came")
    spans = [span for span in collector.spans if span.trace_id.hex() == trace]
    assert Counter(span.name for span in spans) == {"predict": 3, "decode": 3, "queue": 3, "compute": 3}
    roots = [span for span in spans if span.name == "predict"]
    assert {span.parent_span_id.hex() for span in roots} == {parent}
    assert {span.parent_span_id for span in spans if span.name == "compute"} == {span.span_id for span in roots}
    for span in roots:
        attributes = {one.key: one.value for one in span.attributes}
        assert attributes["tome.outcome"].string_value == "answered"


def test_exemplars_name_traces_that_began_here(
    guarded: ServerProcess, channel: grpc.Channel, good: pb.PredictRequest, collector: Collector
) -> None:
    inference_pb2_grpc.InferenceStub(channel).Predict(good, metadata=bearer(ALICE))
    named = exemplars(openmetrics(guarded.metrics_url))["tome_request_duration_seconds"]
    until(lambda: named <= {span.trace_id.hex() for span in collector.spans}, "every trace that is named was sent")

    def begun_here() -> set[str]:
        spans = [span for span in collector.spans if span.name == "predict"]
        return {span.trace_id.hex() for span in spans if not span.parent_span_id}

    # A trace's spans need not come together.
    until(lambda: named & begun_here(), "a trace that is named began here")


# Limits


def test_one_client_cannot_take_all_the_room(
    guarded: ServerProcess, channel: grpc.Channel, good: pb.PredictRequest
) -> None:
    predict = inference_pb2_grpc.InferenceStub(channel).Predict

    def in_the_server(count: int) -> Callable[[], bool]:
        return lambda: scrape(guarded.metrics_url).total("tome_requests_pending") == count

    with device_held(guarded):
        held = [predict.future(good, metadata=bearer(ALICE)) for _ in range(3)]
        until(in_the_server(3), "all requests are in the server")
        with pytest.raises(grpc.RpcError) as caught:
            predict(good, metadata=bearer(ALICE))
        held.append(predict.future(good, metadata=bearer(BOB)))
        until(in_the_server(4), "another's is taken")
    refused = refusal_of(caught.value)
    assert refused.code is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert refused.message == "3 requests of this client are waiting already; retry in 100 ms"
    assert refused.details["RetryInfo"].retry_delay.ToMilliseconds() == 100
    assert dict(caught.value.trailing_metadata())["grpc-retry-pushback-ms"] == "100"
    assert scrape(guarded.metrics_url).total("tome_rejected_total", reason="client_limit") == 1
    assert all(call.result().predictions for call in held)
    assert predict(good, metadata=bearer(ALICE)).predictions


def test_each_message_of_a_stream_counts_as_a_request(
    guarded: ServerProcess, channel: grpc.Channel, good: pb.PredictRequest
) -> None:
    stream = inference_pb2_grpc.InferenceStub(channel).PredictStream
    messages = [pb.PredictStreamRequest(id=str(number), request=good) for number in range(5)]
    with device_held(guarded):
        call = stream(iter(messages), metadata=bearer(ALICE))
        refused = [next(call), next(call)]
    assert [refusal_in(answer.error).code for answer in refused] == [grpc.StatusCode.RESOURCE_EXHAUSTED] * 2
    answered = list(call)
    assert all(answer.HasField("response") for answer in answered)
    assert {answer.id for answer in refused + answered} == {message.id for message in messages}


def test_a_connection_carries_only_so_many_calls_at_once(
    guarded: ServerProcess, channel: grpc.Channel, good: pb.PredictRequest
) -> None:
    """The eighth waits in the client until one of the seven ends."""
    watch = health_pb2_grpc.HealthStub(channel).Watch
    watchers = [watch(health_pb2.HealthCheckRequest()) for _ in range(7)]
    for watcher in watchers:
        next(watcher)
    predict = inference_pb2_grpc.InferenceStub(channel).Predict
    assert refusal(lambda: predict(good, metadata=bearer(ALICE), timeout=0.5)).code is DEADLINE_EXCEEDED
    waiting = predict.future(good, metadata=bearer(ALICE), timeout=PATIENCE)
    watchers[0].cancel()
    assert waiting.result().predictions
    for watcher in watchers:
        watcher.cancel()


def test_logs_hold_neither_tokens_nor_images(
    guarded: ServerProcess, channel: grpc.Channel, good: pb.PredictRequest, tokens: Path
) -> None:
    """Whatever else these tests had the server do; and once more with an image and a token that can't be missed."""
    marked = b"not-an-image-but-a-mark" * 50
    predict = inference_pb2_grpc.InferenceStub(channel).Predict
    for token in (ALICE, EVE):
        refusal(lambda token=token: predict(pb.PredictRequest(image=marked), metadata=bearer(token)))
    tensor = pb.Tensor(data_type=pb.Tensor.DATA_TYPE_UINT8, shape=[1, 1, 3], data=marked)
    refusal(lambda: predict(pb.PredictRequest(tensor=tensor), metadata=bearer(ALICE)))
    kept = tokens.read_text()
    tokens.write_text("sh0rt-and-wrong\n")
    assert predict(good, metadata=bearer(ALICE)).predictions
    tokens.write_text(kept)
    log = guarded.log.read_text()
    assert "the tokens were not exchanged" in log
    told = [json.loads(line) for line in log.splitlines()]
    assert {line["outcome"] for line in told if line["event"] == "request"} >= {"answered", "invalid_request"}
    assert {line["client"] for line in told if line["event"] == "request"} <= {
        f"token-{hashlib.sha256(token.encode()).hexdigest()[:8]}" for token in (ALICE, BOB, EVE)
    }
    for secret in (ALICE, BOB, EVE, "sh0rt", "not-an-image", repr(good.image[:16])[2:-1], good.image[:16].hex()):
        assert secret not in log


@asynccontextmanager
async def serving(server: grpc.aio.Server) -> AsyncIterator[str]:
    """Have a server in this process answer METHODS; yields its address.

    It must be stopped whatever happens: gRPC waits forever for one that is left to the collector.
    """
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("test.Test", METHODS),))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        yield f"127.0.0.1:{port}"
    finally:
        await server.stop(None)


async def test_connections_beyond_the_limit_are_closed_until_others_end() -> None:
    server = grpc.aio.server(options=server_options(RpcSettings("", 2**20, max_connections=2)))
    async with serving(server) as target, AsyncExitStack() as channels:
        await only_two_at_once(target, channels)


async def only_two_at_once(target: str, channels: AsyncExitStack) -> None:

    async def end_of(channel: grpc.aio.Channel) -> grpc.StatusCode:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await channel.unary_unary("/test.Test/Unary")(b"", timeout=PATIENCE)
        return caught.value.code()

    def connection() -> grpc.aio.Channel:
        return grpc.aio.insecure_channel(target, [("grpc.use_local_subchannel_pool", 1)])

    first, second = [await channels.enter_async_context(connection()) for _ in range(2)]
    # The method's own refusal: the connection is there.
    assert await end_of(first) is NOT_FOUND
    assert await end_of(second) is NOT_FOUND
    # Left open, it would try again by itself, and could have the first one's place before the last one asks.
    async with connection() as third:
        assert await end_of(third) is grpc.StatusCode.UNAVAILABLE
    assert await end_of(first) is NOT_FOUND
    await first.close()
    for _ in range(600):
        # A client's failed calls are cycles, and hold their connection until these are collected.
        gc.collect()
        async with connection() as another:
            end = await end_of(another)
        if end is NOT_FOUND:
            break
        await asyncio.sleep(0.1)
    assert end is NOT_FOUND


# Refusals


async def refuse(request: object, context: Any) -> None:
    """As the servicers do: while it handles another error."""
    try:
        assert request is context
    except AssertionError:
        await context.abort(grpc.StatusCode.NOT_FOUND, "no")


async def refuse_later(request: object, context: Any) -> AsyncIterator[bytes]:
    yield b"first"
    await refuse(request, context)


METHODS = {
    "Unary": grpc.unary_unary_rpc_method_handler(refuse),
    "Stream": grpc.unary_stream_rpc_method_handler(refuse_later),
}


@pytest.mark.parametrize(("method", "guard"), [("Unary", False), ("Stream", False), ("Unary", True), ("Stream", True)])
async def test_a_refused_call_is_freed_at_once(tokens: Path, method: str, guard: bool) -> None:
    """Not when the collector of cycles comes by: until then it would fill one of its connection's places."""
    access = AccessInterceptor(Tokens(tokens) if guard else None, ServerMetrics())
    server = grpc.aio.server(interceptors=[access], options=[("grpc.max_concurrent_streams", 5)])
    gc.disable()
    try:
        async with serving(server) as target, grpc.aio.insecure_channel(target) as channel:
            for _ in range(20):
                call = channel.unary_stream(f"/test.Test/{method}")(b"", timeout=PATIENCE)
                with pytest.raises(grpc.aio.AioRpcError) as caught:
                    _ = [response async for response in call]
                assert caught.value.code() is (UNAUTHENTICATED if guard else NOT_FOUND)
    finally:
        gc.enable()
