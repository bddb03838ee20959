"""Who may call, through a real channel to a server that asks for tokens."""

import queue
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
import yaml
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from tome_api.v1 import inference_pb2 as pb
from tome_api.v1 import inference_pb2_grpc

from .wire import PATIENCE, refusal, scrape

ALICE, BOB, EVE = "alice-0123456789abcdef", "bob-0123456789abcdef", "eve-0123456789abcdef"
UNAUTHENTICATED = grpc.StatusCode.UNAUTHENTICATED


@pytest.fixture(scope="module")
def tokens(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("secrets") / "tokens"
    file.write_text(f"{ALICE}\n{BOB}\n")
    return file


@pytest.fixture(scope="module")
def guarded(module_server: Callable[..., Any], tokens: Path) -> Any:
    """A server that asks for tokens, and logs all it can."""
    config = tokens.parent / "server.yaml"
    config.write_text(yaml.safe_dump({"auth": {"tokens": str(tokens)}, "reflection": False}))
    return module_server("--config", str(config), "--default-budget", "60s", "--log-level", "debug")


@pytest.fixture(scope="module")
def channel(guarded: Any) -> Iterator[grpc.Channel]:
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
    guarded: Any, channel: grpc.Channel, good: pb.PredictRequest, method: str
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
    guarded: Any, channel: grpc.Channel, good: pb.PredictRequest, tokens: Path
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
