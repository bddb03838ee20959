"""What the Inference service answers, through a real channel, with the bundled model."""

import queue
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from google.protobuf.duration_pb2 import Duration
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from tests.server.api.rpc.wire import (
    Refusal,
    connected,
    device_held,
    refusal,
    refusal_in,
    refusal_of,
    scores,
    scrape,
    until,
)
from tests.server_process import ServerProcess
from tome_api.v1 import inference_pb2 as pb
from tome_api.v1 import inference_pb2_grpc

SERVICE = "tome_api.v1.Inference"


def seconds(duration: Duration) -> float:
    return duration.ToNanoseconds() / 1e9


def level(model: pb.Model, r: int) -> pb.MergeLevel:
    (found,) = (level for level in model.r_grid if level.r == r)
    return found


def item(id: object, request: pb.PredictRequest) -> pb.PredictStreamRequest:  # noqa: A002
    return pb.PredictStreamRequest(id=str(id), request=request)


# Predict


def test_most_samples_are_recognised(stub: Any, samples: dict[Path, str]) -> None:
    calls = {file: stub.Predict.future(pb.PredictRequest(image=file.read_bytes(), r=0, top_k=1)) for file in samples}
    right = sum(call.result().predictions[0].label == samples[file] for file, call in calls.items())
    assert right >= 0.8 * len(samples)


def test_merging_is_accounted_for_at_every_r_of_the_grid(stub: Any, file: Path, model: pb.Model) -> None:
    dense = 2 * level(model, 0).macs
    for step in model.r_grid:
        merging = stub.Predict(pb.PredictRequest(image=file.read_bytes(), r=step.r)).merging
        assert merging.r == step.r
        assert merging.tokens_in == 197
        assert merging.tokens_out == step.tokens_out
        assert merging.flops == 2 * step.macs
        assert merging.flops_saved == dense - merging.flops
    assert merging.tokens_out < merging.tokens_in
    assert 0.4 * dense < merging.flops < 0.6 * dense


def test_an_r_between_those_of_the_grid_is_respected(stub: Any, file: Path, model: pb.Model) -> None:
    between = next(r for r in range(99) if r not in {step.r for step in model.r_grid})
    for r in (between, 98):
        assert stub.Predict(pb.PredictRequest(image=file.read_bytes(), r=r)).merging.r == r


@pytest.mark.parametrize(
    ("bounds", "allowed"),
    [
        ({}, range(15)),
        ({"min_r": 3}, range(3, 15)),
        ({"max_r": 5}, range(6)),
        ({"max_r": 0}, [0]),
        ({"min_r": 3, "max_r": 3}, [3]),
        ({"min_r": 4, "max_r": 4}, [4]),
        ({"min_r": 98}, [98]),
        ({"r": 4, "min_r": 4, "max_r": 4}, [4]),
        ({"min_r": 8, "max_r": 98}, range(8, 15)),  # beyond the grid, r is only what is asked for
    ],
    ids=str,
)
def test_the_server_chooses_r_within_the_bounds(
    stub: Any, file: Path, bounds: dict[str, int], allowed: Sequence[int]
) -> None:
    assert stub.Predict(pb.PredictRequest(image=file.read_bytes(), **bounds)).merging.r in allowed


def test_the_parts_of_the_time_fit_into_the_whole(stub: Any, good: pb.PredictRequest) -> None:
    timing = stub.Predict(good).timing
    parts = [seconds(part) for part in (timing.decode, timing.queue, timing.compute)]
    assert all(part >= 0 for part in parts)
    assert seconds(timing.compute) > 0
    assert sum(parts) <= seconds(timing.total)
    assert seconds(timing.predicted) > 0
    assert timing.batch_size >= 1


def test_the_deadline_is_the_earlier_of_budget_and_grpc_deadline_or_the_default(
    stub: Any, good: pb.PredictRequest, model: pb.Model
) -> None:
    budgeted = pb.PredictRequest(latency_budget=Duration(seconds=50))
    budgeted.MergeFrom(good)
    for timing, budget in (
        (stub.Predict(good).timing, seconds(model.default_budget)),
        (stub.Predict(good, timeout=200).timing, 200),
        (stub.Predict(budgeted).timing, 50),
        (stub.Predict(budgeted, timeout=200).timing, 50),
        (stub.Predict(budgeted, timeout=40).timing, 40),
    ):
        # On the wire a gRPC deadline is rounded up to two or three digits.
        assert 0.8 * budget < seconds(timing.slack) + seconds(timing.total) < 1.02 * budget


def test_the_most_probable_classes_come_first(stub: Any, file: Path, model: pb.Model) -> None:
    answers = {k: stub.Predict(pb.PredictRequest(image=file.read_bytes(), top_k=k)).predictions for k in (1, 3, 10)}
    unset = stub.Predict(pb.PredictRequest(image=file.read_bytes())).predictions
    assert [len(answers[k]) for k in answers] == [1, 3, 10]
    assert len(unset) == 5
    full = answers[10]
    assert [one.score for one in full] == sorted((one.score for one in full), reverse=True)
    assert sum(one.score for one in full) == pytest.approx(1, abs=1e-4)
    assert all(model.labels[one.class_id] == one.label for one in full)
    for given in (*answers.values(), unset):
        assert [one.class_id for one in given] == [one.class_id for one in full][: len(given)]


def test_features_and_token_map_come_only_on_request(stub: Any, good: pb.PredictRequest, model: pb.Model) -> None:
    plain = stub.Predict(good)
    assert not plain.features
    assert not plain.HasField("token_map")
    asked = stub.Predict(pb.PredictRequest(image=good.image, r=0, return_features=True, return_token_map=True))
    assert len(asked.features) == model.feature_dim
    assert np.isfinite(asked.features).all()
    # Nothing is merged: each patch is its own token, after the class token.
    assert list(asked.token_map.token) == list(range(1, 197))


@pytest.mark.parametrize("r", [0, 8])
def test_features_come_normalised_halved_and_for_each_patch_on_request(
    stub: Any, good: pb.PredictRequest, model: pb.Model, r: int
) -> None:
    def asked(**flags: bool) -> pb.PredictResponse:
        return stub.Predict(pb.PredictRequest(image=good.image, r=r, return_features=True, **flags))

    plain = np.array(asked().features, np.float32)
    assert not asked().HasField("features_float16")
    assert not asked().HasField("patch_features")
    unit = np.array(asked(normalize_features=True).features)
    assert np.linalg.norm(unit) == pytest.approx(1, abs=1e-5)
    assert unit == pytest.approx(plain / np.linalg.norm(plain), abs=1e-4)

    answer = asked(float16_features=True, return_patch_features=True, return_token_map=True)
    assert not answer.features
    assert answer.features_float16.data_type == answer.patch_features.data_type == pb.Tensor.DATA_TYPE_FLOAT16
    assert list(answer.features_float16.shape) == [model.feature_dim]
    half = np.frombuffer(answer.features_float16.data, "<f2")
    assert half.astype(np.float32) == pytest.approx(plain, rel=2e-3, abs=1e-3)
    assert list(answer.patch_features.shape) == [14, 14, model.feature_dim]
    patches = np.frombuffer(answer.patch_features.data, "<f2").reshape(196, -1)
    # Patches of one token have its features, and patches of two have not.
    assert len(np.unique(patches, axis=0)) == len(set(answer.token_map.token)) == answer.merging.tokens_out - 1

    full = asked(return_patch_features=True, normalize_features=True).patch_features
    assert full.data_type == pb.Tensor.DATA_TYPE_FLOAT32
    lengths = np.linalg.norm(np.frombuffer(full.data, "<f4").reshape(196, -1), axis=1)
    assert lengths == pytest.approx(1, abs=1e-5)


def test_float16_is_of_answers_alone(stub: Any) -> None:
    tensor = pb.Tensor(data_type=pb.Tensor.DATA_TYPE_FLOAT16, shape=[3, 28, 28], data=bytes(2 * 3 * 28 * 28))
    with pytest.raises(grpc.RpcError, match="must be DATA_TYPE_UINT8 or DATA_TYPE_FLOAT32"):
        stub.Predict(pb.PredictRequest(tensor=tensor))


@pytest.mark.parametrize("r", [1, 8, 15, 98])
def test_the_token_map_names_every_output_token(stub: Any, good: pb.PredictRequest, r: int) -> None:
    answer = stub.Predict(pb.PredictRequest(image=good.image, r=r, return_token_map=True))
    grid = answer.token_map
    assert (grid.grid_height, grid.grid_width) == (14, 14)
    assert len(grid.token) == 196
    # All but the class token, which no patch is merged into.
    assert set(grid.token) == set(range(1, answer.merging.tokens_out))


def test_batch_mates_get_what_each_asked_for(
    module_server: Callable[..., ServerProcess], samples: dict[Path, str]
) -> None:
    """Images of one batch differ in top_k, features and token map, and none gets another's."""
    # Others take batches of one where the profile, which was measured beside whatever else ran, finds these as fast.
    server = module_server("--policy", "max_batch", "--default-budget", "600s", "--threads", "1")
    images = [file.read_bytes() for file in samples][:8]
    wanted = [
        pb.PredictRequest(image=image, r=8, top_k=i + 1, return_features=i % 2 == 0, return_token_map=i % 3 == 0)
        for i, image in enumerate(images)
    ]
    with connected(server.target) as stub:
        alone = [stub.Predict(request) for request in wanted]
        with device_held(server):
            calls = [stub.Predict.future(request) for request in wanted * 4]
            # A batch may have gone to the device before it was held, or as the first came.
            until(lambda: scrape(server.metrics_url).total("tome_queue_depth") >= 24, "they wait")
        together = [call.result() for call in calls]
    assert max(answer.timing.batch_size for answer in together) == 8
    for i, answer in enumerate(together):
        same = alone[i % len(images)]
        assert len(answer.predictions) == len(same.predictions)
        assert scores(answer) == pytest.approx(scores(same), abs=1e-3)
        assert answer.features == pytest.approx(same.features, abs=1e-3)
        assert answer.HasField("token_map") == same.HasField("token_map")


# Models, health, reflection


def test_the_models_are_listed_and_described(stub: Any, samples: dict[Path, str]) -> None:
    (summary,) = stub.ListModels(pb.ListModelsRequest()).models
    assert (summary.name, summary.architecture, summary.ready) == ("fashion", "vit_tiny_patch16_224", True)
    assert summary.description
    model = stub.GetModel(pb.GetModelRequest(model="fashion")).model
    assert model == stub.GetModel(pb.GetModelRequest()).model
    assert model.summary == summary
    assert (model.input.channels, model.input.height, model.input.width) == (3, 28, 28)
    assert len(model.input.mean) == len(model.input.std) == 3
    assert (model.input.interpolation, model.input.crop_mode, model.input.crop_pct) == ("bicubic", "center", 1)
    assert len(model.labels) == model.num_classes == 10
    assert set(samples.values()) <= set(model.labels)


def test_the_choice_of_r_is_described(model: pb.Model) -> None:
    assert model.policy == "price"
    assert seconds(model.default_budget) == 60


def test_more_merging_costs_less(model: pb.Model) -> None:
    assert [step.r for step in model.r_grid] == sorted({step.r for step in model.r_grid})
    assert model.r_grid[0].r == 0
    for values in ([step.macs for step in model.r_grid], [step.tokens_out for step in model.r_grid]):
        assert values == sorted(set(values), reverse=True)
    latencies = [seconds(step.latency) for step in model.r_grid]
    assert latencies == sorted(latencies, reverse=True)
    for step in model.r_grid:
        assert seconds(step.latency) > 0
        assert 0 < step.agreement <= 1
        assert 0 < step.top1 <= 1


@pytest.mark.parametrize("service", ["", SERVICE, "inference.GRPCInferenceService"])
def test_health_is_serving(server: ServerProcess, service: str) -> None:
    with grpc.insecure_channel(server.target) as channel:
        health = health_pb2_grpc.HealthStub(channel)
        answer = health.Check(health_pb2.HealthCheckRequest(service=service))
        assert answer.status == health_pb2.HealthCheckResponse.SERVING
        unknown = refusal(lambda: health.Check(health_pb2.HealthCheckRequest(service="other")))
        assert unknown.code is grpc.StatusCode.NOT_FOUND


def test_reflection_lists_the_services(server: ServerProcess) -> None:
    with grpc.insecure_channel(server.target) as channel:
        reflection = reflection_pb2_grpc.ServerReflectionStub(channel)
        question = reflection_pb2.ServerReflectionRequest(list_services="")
        (answer,) = reflection.ServerReflectionInfo(iter([question]))
        assert {service.name for service in answer.list_services_response.service} == {
            SERVICE,
            "inference.GRPCInferenceService",
            "grpc.health.v1.Health",
            "grpc.reflection.v1alpha.ServerReflection",
        }
        question = reflection_pb2.ServerReflectionRequest(file_containing_symbol=SERVICE)
        (answer,) = reflection.ServerReflectionInfo(iter([question]))
        assert answer.file_descriptor_response.file_descriptor_proto


# PredictStream


class Conversation:
    """A stream whose messages are sent one by one, as the test says."""

    def __init__(self, stub: Any, timeout: float | None = None) -> None:
        self._outgoing: queue.SimpleQueue[pb.PredictStreamRequest | None] = queue.SimpleQueue()
        self.call = stub.PredictStream(iter(self._outgoing.get, None), timeout=timeout)

    def send(self, id: object, request: pb.PredictRequest) -> None:  # noqa: A002
        self._outgoing.put(item(id, request))

    def half_close(self) -> None:
        self._outgoing.put(None)

    def end(self) -> Refusal | None:
        """Read to the end; returns the status, None for OK."""
        try:
            for _ in self.call:
                pass
        except grpc.RpcError as error:
            return refusal_of(error)
        return None


@pytest.fixture
def converse(stub: Any) -> Iterator[Callable[..., Conversation]]:
    started: list[Conversation] = []

    def start(stub: Any = stub, timeout: float | None = None) -> Conversation:
        started.append(Conversation(stub, timeout))
        return started[-1]

    yield start
    for conversation in started:
        conversation.half_close()
        conversation.call.cancel()


@pytest.fixture(scope="session")
def quick(file: Path) -> pb.PredictRequest:
    return pb.PredictRequest(image=file.read_bytes(), r=15, top_k=1)


def test_a_stream_answers_each_id_as_predict_would(stub: Any, samples: dict[Path, str]) -> None:
    requests = {
        file.name: pb.PredictRequest(image=file.read_bytes(), r=r, top_k=10)
        for file, r in zip(samples, [0, 4, 8] * 10, strict=False)
    }
    answers = list(stub.PredictStream(item(name, request) for name, request in requests.items()))
    assert sorted(answer.id for answer in answers) == sorted(requests)
    for answer in answers:
        alone = stub.Predict(requests[answer.id])
        assert scores(answer.response) == pytest.approx(scores(alone), abs=1e-3)
        assert answer.response.merging == alone.merging


def test_an_empty_stream_ends_well(stub: Any) -> None:
    assert list(stub.PredictStream(iter([]))) == []


def test_answers_come_while_the_stream_is_open(converse: Callable[..., Conversation], good: pb.PredictRequest) -> None:
    conversation = converse()
    for name in ("first", "second"):
        conversation.send(name, good)
        assert next(conversation.call).id == name
    conversation.half_close()
    assert conversation.end() is None


def test_what_was_sent_before_the_half_close_is_answered(
    converse: Callable[..., Conversation], good: pb.PredictRequest
) -> None:
    conversation = converse()
    for i in range(5):
        conversation.send(i, good)
    conversation.half_close()
    assert sorted(answer.id for answer in conversation.call) == list("01234")


def test_a_failed_request_does_not_end_the_stream(stub: Any, good: pb.PredictRequest) -> None:
    image = good.image
    bad = {
        "image": (pb.PredictRequest(image=b"nothing"), grpc.StatusCode.INVALID_ARGUMENT, "BadRequest"),
        "r": (pb.PredictRequest(image=image, r=-1), grpc.StatusCode.INVALID_ARGUMENT, "BadRequest"),
        "model": (pb.PredictRequest(image=image, model="other"), grpc.StatusCode.NOT_FOUND, "ResourceInfo"),
        "budget": (
            pb.PredictRequest(image=image, latency_budget=Duration(nanos=1)),
            grpc.StatusCode.DEADLINE_EXCEEDED,
            "ErrorInfo",
        ),
        "missing": (pb.PredictRequest(), grpc.StatusCode.INVALID_ARGUMENT, "BadRequest"),
    }
    messages = [item("before", good), *(item(name, request) for name, (request, *_) in bad.items())]
    answers = {answer.id: answer for answer in stub.PredictStream(iter([*messages, item("after", good)]))}
    assert answers.keys() == {"before", "after", *bad}
    assert answers["before"].HasField("response")
    assert answers["after"].HasField("response")
    for name, (request, code, detail) in bad.items():
        refused = refusal_in(answers[name].error)
        alone = refusal(lambda request=request: stub.Predict(request))
        # How long it would take is not the same from one moment to the next.
        assert refused == alone or (name == "budget" and refused.details.keys() == alone.details.keys())
        assert refused.code is code
        assert detail in refused.details


def test_an_id_may_be_used_again_only_once_answered(
    converse: Callable[..., Conversation], good: pb.PredictRequest, server: ServerProcess
) -> None:
    counted = {"model": "fashion", "code": "INVALID_ARGUMENT"}
    before = scrape(server.metrics_url).total("tome_requests_total", **counted)
    conversation = converse()
    with device_held(server):
        conversation.send("same", good)
        conversation.send("same", good)
        refused = next(conversation.call)
    answered = next(conversation.call)
    assert (refused.id, answered.id) == ("same", "same")
    assert refusal_in(refused.error).field == "id"
    assert answered.HasField("response")
    conversation.send("same", good)
    assert next(conversation.call).HasField("response")
    conversation.half_close()
    assert conversation.end() is None
    until(
        lambda: scrape(server.metrics_url).total("tome_requests_total", **counted) == before + 1,
        "the refusal is counted",
    )


def test_a_long_id_is_returned_and_not_repeated(stub: Any, good: pb.PredictRequest) -> None:
    name = "x" * 1_000_000
    answers = list(stub.PredictStream(iter([item(name, good)] * 2)))
    assert [answer.id == name for answer in answers] == [True, True]
    assert all(answer.ByteSize() < 1_010_000 for answer in answers)


def test_hundreds_of_messages_go_through_to_a_slow_reader(
    converse: Callable[..., Conversation], quick: pb.PredictRequest, server: ServerProcess
) -> None:
    """More than the server's window and the transport's buffers hold: sending waits for reading, nothing is lost."""
    counted = {"model": "fashion", "code": "OK"}
    start = scrape(server.metrics_url).total("tome_requests_total", **counted)
    conversation = converse()
    names = [f"{i:05}" + "." * 20_000 for i in range(250)]
    for name in names:
        conversation.send(name, quick)
    conversation.half_close()
    first = next(conversation.call)
    # Let the server go as far as it can before it's read from: it never holds more than the window.
    until(
        lambda: scrape(server.metrics_url).total("tome_requests_total", **counted) >= start + 30,
        "the server answers ahead of the reader",
    )
    assert scrape(server.metrics_url).total("tome_requests_pending") <= 64
    answers = [first, *conversation.call]
    assert sorted(answer.id for answer in answers) == names
    assert all(answer.HasField("response") for answer in answers)


def test_a_client_that_goes_away_leaves_nothing_behind(
    server: ServerProcess, converse: Callable[..., Conversation], quick: pb.PredictRequest
) -> None:
    """Cancelled in the middle, or the whole connection cut: what was in flight ends, and the server goes on."""
    cancelled = {"model": "fashion", "code": "CANCELLED"}
    for cut in (False, True):
        before = scrape(server.metrics_url).total("tome_requests_total", **cancelled)
        # With a connection of its own.
        with grpc.insecure_channel(server.target, [("grpc.use_local_subchannel_pool", 1)]) as channel:
            conversation = converse(inference_pb2_grpc.InferenceStub(channel))
            conversation.send("answered", quick)
            assert next(conversation.call).id == "answered"
            with device_held(server):
                for i in range(10):
                    conversation.send(i, quick)
                until(lambda: scrape(server.metrics_url).total("tome_requests_pending") == 10, "all are in flight")
                channel.close() if cut else conversation.call.cancel()
                until(lambda: scrape(server.metrics_url).total("tome_requests_pending") == 0, "nothing is pending")
        conversation.half_close()
        assert scrape(server.metrics_url).total("tome_requests_total", **cancelled) == before + 10
        assert scrape(server.metrics_url).total("tome_queue_depth") == 0
        with connected(server.target) as other:
            assert other.Predict(quick).predictions


def test_a_client_that_goes_away_while_answers_wait_leaves_nothing_behind(
    server: ServerProcess, converse: Callable[..., Conversation], quick: pb.PredictRequest
) -> None:
    """The stream's handler is held by the transport, not by the queue, when it's cancelled."""
    counted = {"model": "fashion", "code": "OK"}
    start = scrape(server.metrics_url).total("tome_requests_total", **counted)
    with connected(server.target) as other:
        conversation = converse(other)
        for i in range(300):
            conversation.send(f"{i}" + "." * 20_000, quick)
        until(
            lambda: scrape(server.metrics_url).total("tome_requests_total", **counted) >= start + 30,
            "the server answers ahead of the reader",
        )
        conversation.call.cancel()
    conversation.half_close()
    until(lambda: scrape(server.metrics_url).total("tome_requests_pending") == 0, "nothing is pending")


def test_the_deadline_of_a_stream_is_that_of_its_requests(
    converse: Callable[..., Conversation], good: pb.PredictRequest, server: ServerProcess
) -> None:
    conversation = converse(timeout=200)
    conversation.send("in time", good)
    timing = next(conversation.call).response.timing
    assert 100 < seconds(timing.slack) + seconds(timing.total) < 204
    conversation.half_close()
    assert conversation.end() is None


def test_a_stream_ends_at_its_deadline(
    converse: Callable[..., Conversation], good: pb.PredictRequest, server: ServerProcess
) -> None:
    conversation = converse(timeout=1)
    conversation.send("in time", good)
    ended = conversation.end()  # it is never half-closed
    assert ended is not None
    assert ended.code is grpc.StatusCode.DEADLINE_EXCEEDED
    until(lambda: scrape(server.metrics_url).total("tome_requests_pending") == 0, "nothing is pending")


def test_a_unary_call_that_is_cancelled_leaves_nothing_behind(
    stub: Any, server: ServerProcess, quick: pb.PredictRequest
) -> None:
    cancelled = {"model": "fashion", "code": "CANCELLED"}
    before = scrape(server.metrics_url).total("tome_requests_total", **cancelled)
    with device_held(server):
        calls = [stub.Predict.future(quick) for _ in range(10)]
        until(lambda: scrape(server.metrics_url).total("tome_requests_pending") == 10, "all are in flight")
        for call in calls:
            call.cancel()
        until(lambda: scrape(server.metrics_url).total("tome_requests_pending") == 0, "nothing is pending")
    assert scrape(server.metrics_url).total("tome_requests_total", **cancelled) == before + 10
