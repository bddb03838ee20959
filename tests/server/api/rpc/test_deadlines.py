"""A deadline decides r, through a real channel and with the bundled model.

What the machine can do in a given time is its own affair: these tests ask for less and less until it shows.
"""

import random
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.protobuf.duration_pb2 import Duration

from tests.server.api.rpc.wire import connected, device_held, refusal, refusal_in, refusal_of, scrape, until
from tests.server_process import ServerProcess
from tome_api.v1 import inference_pb2 as pb

# Enough requests at once for several batches.
CROWD = 64


def duration(seconds: float) -> Duration:
    made = Duration()
    made.FromNanoseconds(round(seconds * 1e9))
    return made


def kept(model: pb.Model, r: int) -> float:
    """The measured quality at r of the grid, as a share of that at r = 0."""
    top1 = {level.r: level.top1 for level in model.r_grid}
    return top1[r] / top1[0]


def answered(calls: list[Any]) -> list[pb.PredictResponse]:
    """Wait for all; returns the predictions. The others must have been refused for their deadline."""
    replies = []
    for call in calls:
        try:
            replies.append(call.result())
        except grpc.RpcError as error:
            if refusal_of(error).code is not grpc.StatusCode.DEADLINE_EXCEEDED:
                raise
    return replies


@pytest.fixture(scope="module")
def image(file: Path) -> bytes:
    return file.read_bytes()


@pytest.fixture
def unhurried_r(stub: Any, image: bytes, model: pb.Model) -> int:
    """The r of a request with time, once the traffic of other tests is forgotten."""
    for _ in range(30):
        r = stub.Predict(pb.PredictRequest(image=image), timeout=100).merging.r
        if kept(model, r) > 0.9995:
            return r
        time.sleep(0.5)
    pytest.fail(f"a lone request with 100 s is merged at r = {r}")


def hurried(
    model: pb.Model, unhurried_r: int, send: Callable[[float], list[pb.PredictResponse]]
) -> list[pb.PredictResponse]:
    """Send crowds with ever less time, from ample on, until they are merged; returns the answers to that crowd."""
    mean = -1.0
    # As long as all take one by one at r = 0, and less; batches may be faster by any factor.
    at_r_0 = CROWD * model.r_grid[0].latency.ToNanoseconds() / 1e9
    for share in [1.5, 1.0, 0.8, 0.65, 0.5, 0.4, 0.3, 0.2, 0.1] * 2:
        replies = send(share * at_r_0)
        if replies and (mean := sum(reply.merging.r for reply in replies) / len(replies)) > unhurried_r + 1:
            return replies
    pytest.fail(f"r stayed at {mean:.1f}")


def test_a_grpc_deadline_alone_decides_r(stub: Any, image: bytes, model: pb.Model, unhurried_r: int) -> None:
    request = pb.PredictRequest(image=image)
    replies = hurried(
        model,
        unhurried_r,
        lambda seconds: answered([stub.Predict.future(request, timeout=seconds) for _ in range(CROWD)]),
    )
    assert max(reply.merging.r for reply in replies) <= model.r_grid[-1].r


def test_a_latency_budget_decides_r_in_a_stream(stub: Any, image: bytes, model: pb.Model, unhurried_r: int) -> None:
    def send(seconds: float) -> list[pb.PredictResponse]:
        request = pb.PredictRequest(image=image, latency_budget=duration(seconds))
        answers = list(stub.PredictStream(pb.PredictStreamRequest(id=str(i), request=request) for i in range(CROWD)))
        assert sorted(int(answer.id) for answer in answers) == list(range(CROWD))
        return [answer.response for answer in answers if answer.HasField("response")]

    for reply in hurried(model, unhurried_r, send):
        assert reply.merging.r in {level.r for level in model.r_grid}


def test_a_crowd_with_time_is_merged_less_than_one_without(
    stub: Any, image: bytes, model: pb.Model, unhurried_r: int
) -> None:
    """The same requests at once, and only what they allow differs."""

    def mean_r(seconds: float) -> float:
        request = pb.PredictRequest(image=image, latency_budget=duration(seconds))
        replies = answered([stub.Predict.future(request) for _ in range(CROWD)])
        return sum(reply.merging.r for reply in replies) / len(replies) if replies else -1.0

    at_r_0 = CROWD * model.r_grid[0].latency.ToNanoseconds() / 1e9
    pairs = []
    for share in [0.6, 0.5, 0.4, 0.3, 0.2]:
        pairs.append((mean_r(100.0), mean_r(share * at_r_0)))
        if pairs[-1][0] + 1 < pairs[-1][1]:
            return
    pytest.fail(f"mean r, with time and without: {pairs}")


# No deadline


def test_a_request_without_a_deadline_is_answered_however_many_there_are_and_has_no_slack(
    stub: Any, image: bytes
) -> None:
    request = pb.PredictRequest(image=image, no_deadline=True)
    calls = [stub.Predict.future(request) for _ in range(CROWD)]
    for reply in [call.result() for call in calls]:
        assert not reply.timing.HasField("slack")
        assert reply.timing.HasField("total")


def test_a_request_without_a_deadline_has_that_of_its_call(stub: Any, image: bytes) -> None:
    reply = stub.Predict(pb.PredictRequest(image=image, no_deadline=True), timeout=100)
    assert 0 < reply.timing.slack.ToNanoseconds() <= 102e9  # gRPC rounds up


def test_a_request_has_a_budget_or_no_deadline(stub: Any, image: bytes) -> None:
    both = pb.PredictRequest(image=image, no_deadline=True, latency_budget=duration(1.0))
    refused = refusal(lambda: stub.Predict(both))
    assert (refused.code, refused.field) == (grpc.StatusCode.INVALID_ARGUMENT, "no_deadline")


# Infeasible


def test_what_cannot_be_met_is_refused_with_what_could_be(server: ServerProcess, stub: Any, image: bytes) -> None:
    before = scrape(server.metrics_url)
    # An image whose pixels can't be decoded: it would be INVALID_ARGUMENT if that had been tried.
    assert b"IDAT\x78" in image
    hopeless = pb.PredictRequest(image=image.replace(b"IDAT\x78", b"IDAT\x00"), latency_budget=duration(0.0005))
    refused = refusal(lambda: stub.Predict(hopeless))
    assert refused.code is grpc.StatusCode.DEADLINE_EXCEEDED
    info = refused.details["ErrorInfo"]
    assert (info.reason, info.domain) == ("INFEASIBLE", "tome-serving")
    assert info.metadata.keys() == {"smallest_latency_ms"}
    assert int(info.metadata["smallest_latency_ms"]) >= 1
    assert "the smallest latency possible now is" in refused.message
    after = scrape(server.metrics_url)
    for name, labels, count in (
        ("tome_rejected_total", {"reason": "infeasible"}, 1),
        ("tome_slo_missed_total", {"reason": "infeasible"}, 1),
        ("tome_requests_total", {"code": "DEADLINE_EXCEEDED"}, 1),
        ("tome_stage_duration_seconds_count", {}, 0),
        ("tome_batch_size_count", {}, 0),
    ):
        assert after.total(name, **labels) - before.total(name, **labels) == count
    with pytest.raises(grpc.RpcError, match="INVALID_ARGUMENT"):
        stub.Predict(pb.PredictRequest(image=b"nothing"))


def test_what_could_be_met_is_met_if_asked_for(stub: Any, image: bytes) -> None:
    """Within several tries, each with more to spare: the machine does other things too."""
    budget = least = 0.0005
    to_spare = 1.25
    for _ in range(20):
        try:
            timing = stub.Predict(pb.PredictRequest(image=image, latency_budget=duration(budget))).timing
        except grpc.RpcError as error:
            info = refusal_of(error).details["ErrorInfo"]
            if info.reason == "INFEASIBLE":
                least = int(info.metadata["smallest_latency_ms"]) / 1e3
        else:
            assert budget > 0.0005
            if timing.slack.ToNanoseconds() > 0:
                return
        budget = to_spare * least
        to_spare *= 1.25
    pytest.fail(f"not in time with {budget * 1e3:.1f} ms")


def test_a_refusal_in_a_stream_says_the_same_and_the_others_go_on(stub: Any, image: bytes) -> None:
    budgets = [50.0, 0.0005] * 10
    requests = (
        pb.PredictStreamRequest(id=str(i), request=pb.PredictRequest(image=image, latency_budget=duration(budget)))
        for i, budget in enumerate(budgets)
    )
    for answer in stub.PredictStream(requests):
        if budgets[int(answer.id)] > 1:
            assert answer.response.predictions
        else:
            refused = refusal_in(answer.error)
            assert refused.code is grpc.StatusCode.DEADLINE_EXCEEDED
            assert refused.details["ErrorInfo"].reason == "INFEASIBLE"


# Bounds


def drawn(chance: random.Random, image: bytes) -> pb.PredictRequest:
    """A request with any bounds, and time or not."""
    request = pb.PredictRequest(image=image, latency_budget=duration(chance.choice([0.05, 0.2, 0.5, 60, 60])))
    if chance.random() < 0.2:
        request.r = chance.choice([0, 3, 8, 14, 40])
    else:
        low, high = sorted(chance.choices(range(15), k=2))
        if chance.random() < 0.7:
            request.min_r = low
        if chance.random() < 0.7:
            request.max_r = high
        if not request.min_r and chance.random() < 0.5:
            request.min_quality = chance.choice([1.0, 0.9995, 0.999, 0.5])
    return request


@pytest.mark.parametrize("seed", range(3))
def test_bounds_hold_under_load(server: ServerProcess, stub: Any, image: bytes, model: pb.Model, seed: int) -> None:
    chance = random.Random(seed)
    requests = [drawn(chance, image) for _ in range(100)]
    with device_held(server):
        stream = stub.PredictStream(pb.PredictStreamRequest(id=str(i), request=one) for i, one in enumerate(requests))
        # Those with time, at least as many as two batches hold.
        until(lambda: scrape(server.metrics_url).total("tome_queue_depth") >= 16, "many wait")
    answers = list(stream)
    assert sorted(int(answer.id) for answer in answers) == list(range(len(requests)))
    for answer in answers:
        request = requests[int(answer.id)]
        if answer.HasField("error"):
            refused = refusal_in(answer.error)
            assert refused.code is grpc.StatusCode.DEADLINE_EXCEEDED
            assert refused.details["ErrorInfo"].reason in ("INFEASIBLE", "EXPIRED")
            continue
        r = answer.response.merging.r
        if request.HasField("r"):
            assert r == request.r
            continue
        assert request.min_r <= r
        if request.HasField("max_r"):
            assert r <= request.max_r
        if request.HasField("min_quality"):
            assert all(kept(model, level.r) >= request.min_quality for level in model.r_grid if level.r <= r)


# The policy that the operator chose


@pytest.fixture(scope="module")
def fixed(module_server: Callable[..., ServerProcess]) -> Iterator[Any]:
    """A stub of a server with one r for all."""
    with connected(module_server("--policy", "fixed:8", "--default-budget", "60s").target) as stub:
        yield stub


def test_a_fixed_policy_is_honoured_within_what_requests_allow(fixed: Any, image: bytes) -> None:
    assert fixed.GetModel(pb.GetModelRequest()).model.policy == "fixed:8"
    for bounds, r in (({}, 8), ({"max_r": 5}, 4), ({"min_r": 10}, 10), ({"r": 3}, 3), ({"r": 0, "max_r": 0}, 0)):
        assert fixed.Predict(pb.PredictRequest(image=image, **bounds)).merging.r == r


def test_the_least_quality_is_kept(fixed: Any, image: bytes, model: pb.Model) -> None:
    seen = set()
    for min_quality in (1.0, 0.9995, 0.999, 0.9):
        r = fixed.Predict(pb.PredictRequest(image=image, min_quality=min_quality)).merging.r
        assert kept(model, r) >= min_quality
        following = next(level.r for level in model.r_grid if level.r > r)
        assert r == 8 or kept(model, following) < min_quality
        seen.add(r)
    assert len(seen) > 1


def test_a_fixed_policy_does_not_hurry(fixed: Any, image: bytes, model: pb.Model) -> None:
    """Nor does it promise what only merging further could make."""
    seconds = 0.3 * CROWD * model.r_grid[0].latency.ToNanoseconds() / 1e9
    request = pb.PredictRequest(image=image, latency_budget=duration(seconds))
    assert {reply.merging.r for reply in answered([fixed.Predict.future(request) for _ in range(CROWD)])} <= {8}
