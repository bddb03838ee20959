"""The metrics of a live server say what its replies said."""

import random
import re
import shutil
import subprocess
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.protobuf.duration_pb2 import Duration

from tests.server.api.rpc.wire import (
    Metrics,
    connected,
    device_held,
    exemplars,
    exposition,
    openmetrics,
    refusal,
    scrape,
    until,
)
from tests.server_process import ServerProcess
from tome_api.v1 import inference_pb2 as pb
from tome_server.observability import buckets


@pytest.fixture(scope="module")
def stub(server: ServerProcess) -> Iterator[Any]:
    with connected(server.target) as stub:
        yield stub


@pytest.fixture(scope="module")
def image(samples: dict[Path, str]) -> bytes:
    return min(samples).read_bytes()


class Change:
    """What a server's metrics have grown by since this was made."""

    def __init__(self, url: str) -> None:
        self._url = url
        self._before = scrape(url)

    def now(self) -> Metrics:
        return Metrics({key: value - self._before.get(key, 0) for key, value in scrape(self._url).items()})

    def requests(self) -> dict[tuple[str, str], float]:
        """Requests by model and code."""
        return {
            (dict(labels)["model"], dict(labels)["code"]): value
            for (name, labels), value in self.now().items()
            if name == "tome_requests_total" and value
        }


def test_counters_and_histograms_equal_the_sums_over_the_replies(
    server: ServerProcess, stub: Any, image: bytes
) -> None:
    change = Change(server.metrics_url)
    rs = [0, 1, 4, 8, 15, 98] * 4
    calls = [stub.Predict.future(pb.PredictRequest(image=image, r=r)) for r in rs]
    replies = [call.result() for call in calls]
    messages = (pb.PredictStreamRequest(id=str(i), request=pb.PredictRequest(image=image, r=4)) for i in range(6))
    replies += [answer.response for answer in stub.PredictStream(messages)]
    rs += [4] * 6
    now = change.now()

    merging = [reply.merging for reply in replies]
    assert now.total("tome_tokens_input_total", model="fashion") == sum(one.tokens_in for one in merging)
    assert now.total("tome_tokens_merged_total", model="fashion") == sum(
        one.tokens_in - one.tokens_out for one in merging
    )
    assert now.total("tome_flops_total", model="fashion") == sum(one.flops for one in merging)
    assert now.total("tome_flops_saved_total", model="fashion") == sum(one.flops_saved for one in merging) > 0
    assert change.requests() == {("fashion", "OK"): len(replies)}

    assert now.total("tome_request_duration_seconds_count", model="fashion") == len(replies)
    durations = sum(reply.timing.total.ToNanoseconds() for reply in replies) / 1e9
    assert now.total("tome_request_duration_seconds_sum", model="fashion") == pytest.approx(durations)
    for stage in ("decode", "queue", "compute"):
        given = sum(getattr(reply.timing, stage).ToNanoseconds() for reply in replies) / 1e9
        assert now.total("tome_stage_duration_seconds_count", stage=stage) == len(replies)
        assert now.total("tome_stage_duration_seconds_sum", stage=stage) == pytest.approx(given)
    # The stages are all there is.
    assert now.total("tome_stage_duration_seconds_sum") == pytest.approx(durations)

    slack = sum(reply.timing.slack.ToNanoseconds() for reply in replies) / 1e9
    assert now.total("tome_deadline_slack_seconds_count", model="fashion") == len(replies)
    assert now.total("tome_deadline_slack_seconds_sum", model="fashion") == pytest.approx(slack)
    assert now.total("tome_slo_met_total", model="fashion") == len(replies)
    assert now.total("tome_slo_missed_total") == 0
    assert now.total("tome_rejected_total") == 0

    assert now.total("tome_merge_r_count") == len(replies)
    assert now.total("tome_merge_r_sum") == sum(rs)
    # The buckets are the r grid, and the most that a request may name.
    grid = [step.r for step in stub.GetModel(pb.GetModelRequest()).model.r_grid]
    bounds = {dict(labels)["le"] for (name, labels) in now if name == "tome_merge_r_bucket"}
    assert bounds == {*(str(float(r)) for r in [*grid, 98]), "+Inf"}
    assert scrape(server.metrics_url).total("tome_merge_r_limit", model="fashion") == grid[-1]
    for bound in (0, 4, 8, 14, 98):
        assert now.total("tome_merge_r_bucket", le=str(float(bound))) == sum(r <= bound for r in rs)
    # A batch of n is in n replies.
    sizes = Counter(reply.timing.batch_size for reply in replies)
    assert now.total("tome_batch_size_count") == sum(count / size for size, count in sizes.items())
    assert now.total("tome_batch_size_sum") == len(replies)
    batches = now.total("tome_batch_size_count")
    assert now.total("tome_latency_prediction_ratio_count", model="fashion") == batches
    compute = sum(reply.timing.compute.ToNanoseconds() / reply.timing.batch_size for reply in replies) / 1e9
    assert now.total("tome_compute_seconds_total", model="fashion") == pytest.approx(compute)
    assert now.total("tome_compute_wasted_seconds_total") == 0
    assert now.total("tome_speedup_ratio_count", model="fashion") == batches
    assert now.total("tome_speedup_ratio_sum", model="fashion") > 0
    assert now.total("tome_policy_failures_total") == 0
    # Quality is known at the r of the grid.
    top1 = {step.r: step.top1 for step in stub.GetModel(pb.GetModelRequest()).model.r_grid}
    assert now.total("tome_quality_ratio_count", model="fashion") == sum(r in top1 for r in rs)
    assert now.total("tome_quality_ratio_sum", model="fashion") == pytest.approx(
        sum(top1[r] / top1[0] for r in rs if r in top1)
    )
    # What is in flight is nothing now.
    assert scrape(server.metrics_url).total("tome_requests_pending") == 0
    assert scrape(server.metrics_url).total("tome_queue_depth") == 0


def test_refused_requests_are_counted_under_their_codes_and_nowhere_else(
    server: ServerProcess, stub: Any, image: bytes
) -> None:
    change = Change(server.metrics_url)
    bad = [
        pb.PredictRequest(image=b"nothing"),
        pb.PredictRequest(image=image, r=-1),
        pb.PredictRequest(image=image, model="other"),
        pb.PredictRequest(image=image, model="another", r=-1),
        pb.PredictRequest(image=image, latency_budget=Duration(nanos=1)),
        pb.PredictRequest(),
    ]
    for request in bad:
        refusal(lambda request=request: stub.Predict(request))
    answers = list(stub.PredictStream(pb.PredictStreamRequest(id=str(i), request=r) for i, r in enumerate(bad)))
    assert all(answer.HasField("error") for answer in answers)
    assert change.requests() == {
        ("fashion", "INVALID_ARGUMENT"): 6,
        ("fashion", "DEADLINE_EXCEEDED"): 2,
        ("unknown", "NOT_FOUND"): 4,
    }
    now = change.now()
    assert now.total("tome_rejected_total", reason="infeasible") == 2
    assert now.total("tome_slo_missed_total", reason="infeasible") == 2
    assert now.total("tome_slo_missed_total") == 2  # what is wrong whatever the deadline is no miss
    assert now.total("tome_slo_met_total") == 0
    for name in ("request_duration_seconds_count", "flops_total", "tokens_input_total", "merge_r_count"):
        assert now.total(f"tome_{name}") == 0


def test_cancelled_requests_are_counted_as_such(server: ServerProcess, stub: Any, image: bytes) -> None:
    change = Change(server.metrics_url)
    with device_held(server):
        calls = [stub.Predict.future(pb.PredictRequest(image=image)) for _ in range(6)]
        until(lambda: scrape(server.metrics_url).total("tome_requests_pending") == 6, "requests are in flight")
        for call in calls:
            call.cancel()
        until(lambda: scrape(server.metrics_url).total("tome_requests_pending") == 0, "nothing is pending")
    assert change.requests() == {("fashion", "CANCELLED"): 6}


def test_overload_is_counted(own_server: Callable[..., ServerProcess], image: bytes) -> None:
    server = own_server("--max-pending", "1", "--threads", "1")
    request = pb.PredictRequest(image=image, latency_budget=Duration(seconds=100))
    refused = []
    with connected(server.target) as stub, device_held(server):
        taken = stub.Predict.future(request)
        until(lambda: scrape(server.metrics_url).total("tome_requests_pending") == 1, "it is full")
        for _ in range(3):
            with pytest.raises(grpc.RpcError) as caught:
                stub.Predict(request)
            refused.append(caught.value)
        taken.cancel()
    for error in refused:
        assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert "grpc-retry-pushback-ms" in dict(error.trailing_metadata())
    counted = scrape(server.metrics_url)
    assert counted.total("tome_requests_total", code="RESOURCE_EXHAUSTED") == len(refused)
    assert counted.total("tome_rejected_total", model="fashion", reason="queue_full") == len(refused)
    assert counted.total("tome_slo_missed_total", model="fashion", reason="queue_full") == len(refused)


def test_exemplars_name_the_traces_of_answers_and_misses(server: ServerProcess, stub: Any, image: bytes) -> None:
    recorded, not_recorded = f"{random.getrandbits(127) + 1:032x}", f"{random.getrandbits(127) + 1:032x}"
    for trace, flags in ((recorded, "01"), (not_recorded, "00")):
        metadata = [("traceparent", f"00-{trace}-00f067aa0ba902b7-{flags}")]
        stub.Predict(pb.PredictRequest(image=image, r=4), metadata=metadata)
        request = pb.PredictRequest(image=image, latency_budget=Duration(nanos=1))
        refusal(lambda request=request, metadata=metadata: stub.Predict(request, metadata=metadata))
    found = exemplars(openmetrics(server.metrics_url))
    for name in ("tome_request_duration_seconds", "tome_stage_duration_seconds", "tome_deadline_slack_seconds"):
        assert recorded in found[name]
    assert recorded in found["tome_slo_missed"]
    assert not any(not_recorded in traces for traces in found.values())


def test_openmetrics_says_the_same_as_the_older_format(server: ServerProcess) -> None:
    new = {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in openmetrics(server.metrics_url).values()
        for sample in family.samples
    }
    assert new == scrape(server.metrics_url)


def test_names_have_our_prefix_and_base_units(server: ServerProcess) -> None:
    text = exposition(server.metrics_url)
    families = dict(re.findall(r"^# TYPE (\S+) (\S+)$", text, re.MULTILINE))
    assert set(re.findall(r"^# HELP (\S+) \S", text, re.MULTILINE)) == set(families)
    for name, kind in families.items():
        assert name.startswith("tome_")
        assert not re.search(r"_(ms|millis|milliseconds|us|minutes|kb|mb|percent)(_|$)", name)
        if kind == "counter":
            assert name.endswith(("_total", "_created"))
    durations = {name for name in families if "duration" in name and not name.endswith("_created")}
    assert durations == {"tome_request_duration_seconds", "tome_stage_duration_seconds"}
    assert {
        "tome_deadline_slack_seconds",
        "tome_slo_met_total",
        "tome_slo_missed_total",
        "tome_rejected_total",
        "tome_latency_prediction_ratio",
        "tome_quality_ratio",
        "tome_compute_seconds_total",
        "tome_compute_wasted_seconds_total",
        "tome_policy_failures_total",
    } <= set(families)
    info = {key for key, value in scrape(server.metrics_url).items() if key[0] == "tome_model_info" and value == 1}
    assert [dict(labels)["model"] for _, labels in info] == ["fashion"]


BUCKETS = {name: value for name, value in vars(buckets).items() if isinstance(value, buckets.Buckets)}


@pytest.mark.parametrize("histogram", BUCKETS.values(), ids=BUCKETS.keys())
def test_buckets_rise_and_have_a_reason(histogram: buckets.Buckets) -> None:
    assert list(histogram.bounds) == sorted(set(histogram.bounds))
    assert histogram.reason.endswith(".")


def test_promtool_finds_nothing_wrong(server: ServerProcess) -> None:
    promtool = shutil.which("promtool")
    if promtool is None:
        pytest.skip("needs promtool: apt-get install -y --no-install-recommends prometheus")
    checked = subprocess.run(
        [promtool, "check", "metrics"],
        input=exposition(server.metrics_url),
        capture_output=True,
        text=True,
        check=False,
    )
    assert checked.returncode == 0, checked.stdout + checked.stderr
