"""The life of a request, with a device and a decoder that do what the test says, when it says so."""

import asyncio
import json
import math
import random
import re
from collections.abc import Callable
from dataclasses import replace

import pytest
from google.rpc import error_details_pb2
from prometheus_client import generate_latest

from tests.server.scripted import (
    LATE,
    POLICIES,
    QUICK,
    RS,
    SLOW,
    SOON,
    TOP,
    Bench,
    Clock,
    ScriptedDecoder,
    ScriptedDevice,
    image_of,
    infeasible,
    profile_of,
    refused,
    until,
    use,
)
from tome_server.api.oip.messages import InferRequest, RequestedOutput, Tensor
from tome_server.api.oip.service import OpenInference
from tome_server.api.rest.errors import refusal
from tome_server.api.status import status_of
from tome_server.config.model_overrides import BatchingOverrides, ModelOverrides
from tome_server.errors import (
    DeviceDiedError,
    ExpiredError,
    InfeasibleError,
    InvalidRequestError,
    ModelFailedError,
    NoMemoryError,
    OverloadedError,
    UnavailableError,
    UnknownModelError,
)
from tome_server.execution.batch import Outputs
from tome_server.models.model_info import ModelInfo
from tome_server.models.preprocess import InputSize
from tome_server.observability.metrics import Metrics
from tome_server.scheduling.policy.view import Decision, View
from tome_server.serving.batcher import PROBE_AFTER
from tome_server.serving.engine import Engine
from tome_server.serving.overhead import FRESH
from tome_server.serving.requests import Reply
from tome_server.serving.served import ServedModel

# The plain way


async def test_a_request_is_answered_with_its_own_result_and_cost(bench: Bench, bundled: ModelInfo) -> None:
    reply = await bench.predict(7, r=4)
    assert image_of(reply) == 7
    assert (reply.model.name, reply.r) == ("first", 4)
    assert reply.flops == 2 * bundled.cost(4).total
    assert reply.flops_saved == 2 * (bundled.cost(4).dense - bundled.cost(4).total)
    assert reply.timing.batch_size == 1
    assert reply.timing.slack == pytest.approx(LATE - reply.timing.total)
    assert bench.device.batches == [("first", (4,), (7,))]


# Cancelled


@pytest.mark.parametrize("threads", [1, 2])
async def test_a_request_cancelled_while_it_decodes_is_forgotten(start: Callable[..., Bench], threads: int) -> None:
    bench = start(threads=threads)
    bench.decoder.gate.clear()
    gone, mate = bench.predict(1), bench.predict(2)
    await until(lambda: bench.gauge("tome_requests_pending") == 2)
    gone.cancel()
    with pytest.raises(asyncio.CancelledError):
        await gone
    assert bench.gauge("tome_requests_pending") == 1
    bench.decoder.gate.set()
    assert image_of(await mate) == 2
    assert bench.device.seen == {2: 1}


async def test_a_request_cancelled_in_the_queue_never_reaches_the_device(bench: Bench) -> None:
    await bench.hold_device()
    before, gone, after = await bench.in_order(1, 2, 3)
    gone.cancel()
    with pytest.raises(asyncio.CancelledError):
        await gone
    assert bench.gauge("tome_queue_depth") == 2
    bench.device.gate.set()
    assert [image_of(reply) for reply in await asyncio.gather(before, after)] == [1, 3]
    assert bench.device.seen == {0: 1, 1: 1, 3: 1}


# Expired


async def test_a_deadline_that_passes_while_decoding_says_so(bench: Bench, stopped: Clock) -> None:
    bench.decoder.gate.clear()
    late = bench.predict(1, within=SOON)
    await until(lambda: bench.decoder.decoded)
    stopped.skip(SOON)
    error = await refused(late)
    assert isinstance(error, ExpiredError)
    assert error.stage == "decode"
    assert str(error) == "the deadline passed during decode, 50 ms after arrival"
    bench.decoder.gate.set()
    await bench.predict(2)
    assert bench.device.seen == {2: 1}


async def test_a_deadline_that_passes_in_the_queue_says_so_and_never_reaches_the_device(
    bench: Bench, stopped: Clock
) -> None:
    holding = await bench.hold_device()
    (late,) = await bench.in_order(1, within=SOON)
    stopped.skip(SOON)
    error = await refused(late)
    assert isinstance(error, ExpiredError)
    assert error.stage == "queue"
    bench.device.gate.set()
    await holding
    await bench.predict(2)
    assert bench.device.seen == {0: 1, 2: 1}


async def test_a_deadline_that_passes_on_the_device_says_so_and_its_mates_are_answered(
    bench: Bench, stopped: Clock
) -> None:
    holding = await bench.hold_device()
    late, mate = bench.predict(1, within=1), bench.predict(2)
    await bench.queued(2)
    bench.device.step()
    await holding
    assert sorted(await bench.device.started.get()) == [1, 2]
    stopped.skip(1)
    error = await refused(late)
    assert isinstance(error, ExpiredError)
    assert error.stage == "compute"
    bench.device.gate.set()
    assert image_of(await mate) == 2


async def test_a_call_cancelled_at_its_deadline_has_missed_it_and_one_cancelled_before_has_not(
    bench: Bench, clock: Clock
) -> None:
    holding = await bench.hold_device()
    late, gone = await bench.in_order(1, 2, within=LATE / 2)
    gone.cancel()
    await bench.queued(1)
    # As gRPC does, where the machine is so busy that our own look at the clock comes later.
    clock.skip(LATE / 2)
    late.cancel()
    for task in (late, gone):
        with pytest.raises(asyncio.CancelledError):
            await task
    assert bench.metric("tome_slo_missed_total", reason="expired") == 1
    bench.device.gate.set()
    await holding
    assert bench.device.seen == {0: 1}


@pytest.mark.parametrize("within", [0.0, -0.001, -1000.0])
async def test_a_deadline_that_is_over_on_arrival_is_refused_undecoded(bench: Bench, within: float) -> None:
    assert (await infeasible(bench.predict(1, within=within))).smallest > 0
    await bench.predict(2)
    assert bench.decoder.decoded == [b"2"]
    assert bench.device.seen == {2: 1}


async def test_a_deadline_that_is_kept_leaves_slack(bench: Bench) -> None:
    reply = await bench.predict(1, within=LATE)
    assert reply.timing.slack == pytest.approx(LATE - reply.timing.total)


# Failed


async def test_an_image_that_cannot_be_decoded_fails_alone(bench: Bench) -> None:
    good, bad = bench.predict(1), bench.predict("x")
    assert isinstance(await refused(bad), InvalidRequestError)
    assert image_of(await good) == 1
    # No server could have answered it: that is no miss.
    assert bench.gauge("tome_slo_missed_total") == 0
    assert bench.metric("tome_slo_met_total") == 1


async def test_a_failure_is_not_a_refusal_when_it_is_no_request_error(bench: Bench) -> None:
    """A bug in decoding comes out as it is, for the log, and leaves nothing behind."""
    bench.decoder.encoded = None
    with pytest.raises(TypeError):
        await bench.predict(1)


# Refused


async def test_one_request_too_many_is_refused_until_another_is_answered(start: Callable[..., Bench]) -> None:
    bench = start(max_pending=3)
    holding = await bench.hold_device()
    tasks = await bench.in_order(1, 2)
    error = await refused(bench.predict(3))
    assert isinstance(error, OverloadedError)
    assert error.retry_after > 0
    assert str(error).startswith("3 requests are waiting already; retry in ")
    bench.device.gate.set()
    await asyncio.gather(holding, *tasks)
    assert image_of(await bench.predict(3)) == 3
    assert bench.device.seen[3] == 1


async def test_a_request_refused_for_its_own_sake_takes_no_place(start: Callable[..., Bench]) -> None:
    bench = start(max_pending=1)
    for fields in (
        {"model": "nothing"},
        {"model": "third"},
        {"r": -1},
        {"min_quality": 2.0},
        {"outputs": Outputs(top_k=0)},
    ):
        await refused(bench.predict(1, **fields))
        bench.assert_idle()
    await bench.predict(1)


async def test_a_model_may_hold_fewer_requests_than_the_server(start: Callable[..., Bench]) -> None:
    bench = start(second=ModelOverrides(batching=BatchingOverrides(max_pending=2)))
    on_device = await bench.hold_device()
    held = await bench.in_order(1, 2, model="second")
    error = await refused(bench.predict(3, model="second"))
    assert isinstance(error, OverloadedError)
    assert str(error).startswith("2 requests are waiting")
    others = await bench.in_order(4, 5, 6)
    bench.device.gate.set()
    assert [image_of(reply) for reply in await asyncio.gather(on_device, *held, *others)] == [0, 1, 2, 4, 5, 6]


async def test_a_model_may_not_hold_more_requests_than_the_server(start: Callable[..., Bench]) -> None:
    bench = start(max_pending=1, second=ModelOverrides(batching=BatchingOverrides(max_pending=2)))
    on_device = await bench.hold_device()
    assert isinstance(await refused(bench.predict(1, model="second")), OverloadedError)
    bench.device.gate.set()
    await on_device


async def test_models_are_known_loading_or_unknown(bench: Bench) -> None:
    assert (await bench.predict(1, model="second")).model.name == "second"
    loading = await refused(bench.predict(1, model="third"))
    assert isinstance(loading, UnavailableError)
    assert str(loading) == "model third is loading"
    unknown = await refused(bench.predict(1, model="fourth"))
    assert isinstance(unknown, UnknownModelError)
    assert str(unknown) == "no model is named 'fourth'; this server hosts first, second, third"


async def test_draining_refuses_the_new_and_finishes_the_old(bench: Bench) -> None:
    holding = await bench.hold_device()
    queued = await bench.in_order(1, 2)
    bench.decoder.gate.clear()
    decoding = bench.predict(3)
    await until(lambda: bench.gauge("tome_requests_pending") == 4)
    bench.engine.drain()
    assert isinstance(await refused(bench.predict(4)), UnavailableError)
    bench.decoder.gate.set()
    bench.device.gate.set()
    replies = await asyncio.gather(holding, *queued, decoding)
    assert [image_of(reply) for reply in replies] == [0, 1, 2, 3]
    assert isinstance(await refused(bench.predict(5)), UnavailableError)


# r, within what a request allows


@pytest.mark.parametrize("policy", ["max_accuracy", "max_batch", "slackfit"])
async def test_a_tight_and_a_loose_request_in_one_queue_get_different_r(
    start: Callable[..., Bench], stopped: Clock, policy: str
) -> None:
    bench = start(policy, SLOW, max_batch=1)
    await bench.hold_device()
    loose, tight = bench.predict(1), bench.predict(2, within=5.0)
    await bench.queued(2)
    stopped.skip(3.2)
    bench.device.gate.set()
    # Promised for one image is 2.2 at r = 0 and 1.65 at r = 14.
    assert [(await loose).r, (await tight).r >= 12] == [0, True]
    assert [images for *_, images in bench.device.batches] == [(0,), (2,), (1,)]


async def test_requests_with_time_on_an_idle_device_are_merged_only_where_that_costs_next_to_nothing(
    start: Callable[..., Bench], clock: Clock, bundled: ModelInfo
) -> None:
    bench = start("price", 0.01 * SLOW)
    assert bundled.relative_quality is not None
    for image in range(5):
        r = (await bench.predict(image)).r
        assert bundled.relative_quality[RS.index(r)] > 0.9995
        clock.skip(60)


async def test_a_queue_that_would_be_late_is_merged_further(start: Callable[..., Bench]) -> None:
    """Alone, each would have time for r = 0; as it is, no smaller r than the largest gets all of them answered."""
    bench = start("price", SLOW)
    await bench.hold_device()
    tasks = await bench.in_order(*range(1, 25), within=30.0)
    bench.device.gate.set()
    replies = await asyncio.gather(*tasks)
    assert min(reply.r for reply in replies) > 0


async def test_the_least_quality_bounds_r(start: Callable[..., Bench], bundled: ModelInfo) -> None:
    bench = start("fixed:14")
    assert bundled.relative_quality is not None
    for min_quality in (1.0, 0.999, 0.99):
        r = (await bench.predict(1, min_quality=min_quality)).r
        assert min(bundled.relative_quality[: RS.index(r) + 1]) >= min_quality
    assert r == TOP
    assert (await refused(bench.predict(1, r=TOP, min_quality=1.0))).field == "min_quality"


async def test_the_reply_says_what_was_expected(start: Callable[..., Bench]) -> None:
    bench = start("fixed:0", SLOW)
    bench.device.slowness = 3.0
    timing = (await bench.predict(1)).timing
    assert timing.predicted == pytest.approx(2.0)
    assert timing.compute == pytest.approx(6.0)


async def test_a_request_without_a_deadline_gets_the_default_budget(start: Callable[..., Bench], clock: Clock) -> None:
    bench = start()
    reply = await bench.predict(1)
    assert reply.timing.slack + reply.timing.total == pytest.approx(LATE)
    holding = await bench.hold_device()
    (late,) = await bench.in_order(1)
    clock.skip(LATE)
    for task in (holding, late):
        assert isinstance(await refused(task), ExpiredError)


# Infeasible


@pytest.mark.usefixtures("stopped")
async def test_what_cannot_be_met_is_refused_before_it_is_decoded(start: Callable[..., Bench]) -> None:
    bench = start(unit=SLOW)
    # Alone, merged the most, it is promised in 1.65.
    error = await infeasible(bench.predict(1, within=1.6))
    assert error.smallest == pytest.approx(1.65, abs=0.01)
    assert str(error).startswith("the deadline can't be met; the smallest latency possible now is 16")
    assert bench.decoder.decoded == []
    assert bench.device.batches == []
    assert bench.metric("tome_rejected_total", reason="infeasible") == 1
    assert bench.metric("tome_slo_missed_total", reason="infeasible") == 1
    # With some room for decoding, which has never been measured yet, just that is enough.
    reply = await bench.predict(2, within=error.smallest + 0.1)
    assert reply.r >= 10
    assert reply.timing.slack > 0
    assert bench.metric("tome_slo_met_total") == 1


@pytest.mark.usefixtures("stopped")
@pytest.mark.parametrize("unit", [SLOW, SLOW * 0.0733, SLOW / 7, SLOW / 9, SLOW / 9999, SLOW / 1e6])
async def test_the_smallest_latency_that_a_refusal_names_is_not_refused(
    start: Callable[..., Bench], unit: float
) -> None:
    """Neither in its text nor in its details: in whole milliseconds, they are rounded upwards."""
    bench = start(unit=unit)
    error = await infeasible(bench.predict(1, within=1e-9))
    (named,) = re.findall(r"is (\d+) ms$", str(error))
    info = error_details_pb2.ErrorInfo()
    assert status_of(error).details[0].Unpack(info)
    assert info.metadata["smallest_latency_ms"] == named
    assert json.loads(refusal(error).body)["smallest_latency_ms"] == int(named) > 0
    reply = await bench.predict(2, within=int(named) / 1e3)
    assert image_of(reply) == 2


@pytest.mark.parametrize(
    ("bounds", "smallest"), [({"max_r": 0}, 2.2), ({"r": 0}, 2.2), ({"r": 7}, 1.1 * (2 - 3 / 14)), ({"r": 98}, 1.65)]
)
@pytest.mark.usefixtures("stopped")
async def test_the_smallest_latency_is_that_of_what_the_request_allows(
    start: Callable[..., Bench], bounds: dict[str, int], smallest: float
) -> None:
    bench = start(unit=SLOW)
    assert (await infeasible(bench.predict(1, within=1.0, **bounds))).smallest == pytest.approx(smallest, abs=0.01)
    assert image_of(await bench.predict(2, within=smallest + 0.2, **bounds)) == 2


@pytest.mark.usefixtures("stopped")
async def test_a_fixed_policy_promises_only_what_it_does(start: Callable[..., Bench]) -> None:
    bench = start("fixed:0", unit=SLOW)
    error = await infeasible(bench.predict(1, within=1.8))
    assert error.smallest == pytest.approx(2.2, abs=0.01)
    assert bench.decoder.decoded == []
    assert (await bench.predict(2, within=error.smallest + 0.1)).r == 0


@pytest.mark.usefixtures("stopped")
async def test_those_with_an_earlier_deadline_and_the_batch_on_the_device_are_reckoned_with(
    start: Callable[..., Bench],
) -> None:
    bench = start(unit=SLOW, max_batch=1)
    await bench.hold_device()  # expected to end within 2.2
    first = await bench.in_order(1, 2, within=50.0)
    error = await infeasible(bench.predict(3, within=3.0))
    assert error.smallest == pytest.approx(2.2 + 1.65, abs=0.01)
    bench.device.gate.set()
    await asyncio.gather(*first)


@pytest.mark.usefixtures("stopped")
async def test_requests_shed_in_the_queue_are_told_so(
    start: Callable[..., Bench], monkeypatch: pytest.MonkeyPatch
) -> None:
    def shed_all_but_the_last(view: View) -> Decision:
        return Decision(view.waiting[-1:], [0], view.waiting[:-1])

    use(monkeypatch, shed_all_but_the_last)
    bench = start(unit=SLOW)
    await bench.hold_device()
    *shed, last = await bench.in_order(1, 2, 3)
    bench.device.gate.set()
    for task in shed:
        assert (await infeasible(task)).smallest == pytest.approx(1.65, abs=0.01)
    assert image_of(await last) == 3
    assert bench.device.seen == {0: 1, 3: 1}
    assert bench.metric("tome_slo_missed_total", reason="infeasible") == 2


async def test_those_who_have_become_hopeless_in_the_queue_are_told_so(
    start: Callable[..., Bench], stopped: Clock
) -> None:
    bench = start(unit=SLOW)
    holding = await bench.hold_device()
    hopeless, hopeful = await bench.in_order(1, within=10.0) + await bench.in_order(2, within=20.0)
    stopped.skip(9.0)
    bench.device.gate.set()
    # From now on, that is, if it were sent again.
    assert (await infeasible(hopeless)).smallest == pytest.approx(1.65, abs=0.01)
    assert image_of(await hopeful) == 2
    await holding
    assert bench.device.seen == {0: 1, 2: 1}


# Predictions


async def test_while_the_device_is_slow_less_is_admitted_and_an_idle_spell_forgets_that(
    start: Callable[..., Bench], clock: Clock
) -> None:
    bench = start(unit=SLOW)
    bench.device.slowness = 3.0
    for image in range(10):
        assert image_of(await bench.predict(image)) == image
    assert (await infeasible(bench.predict(99, within=3.0))).smallest > 3 * 1.5
    # No batch runs now that could tell that the device has recovered.
    for _ in range(20):
        clock.skip(3.0)
        task = bench.predict(98, within=3.0)
        if not isinstance((await asyncio.gather(task, return_exceptions=True))[0], InfeasibleError):
            break
    assert image_of(await task) == 98


async def test_replies_that_are_slow_on_their_way_back_are_allowed_for(
    start: Callable[..., Bench], stopped: Clock
) -> None:
    bench = start(unit=SLOW)
    assert (await infeasible(bench.predict(1, within=1.0))).smallest == pytest.approx(1.65, abs=0.01)
    for _ in range(5):
        holding = await bench.hold_device()
        stopped.skip(2.0 + 5.0)  # the device will say that it took 2
        bench.device.gate.set()
        await holding
    error = await infeasible(bench.predict(1, within=5.0))
    assert error.smallest == pytest.approx(5.0 + 1.65, abs=0.01)
    assert bench.device.seen == {0: 5}
    reply = await bench.predict(1, within=error.smallest + 0.2)
    assert reply.r > 0
    # Once replies are quick again, that is forgotten.
    for image in range(64):
        await bench.predict(image)
    assert image_of(await bench.predict(1, within=2.0)) == 1


# Requests without a deadline


async def test_a_request_without_a_deadline_is_never_refused_for_time_and_has_no_slack(
    start: Callable[..., Bench], stopped: Clock
) -> None:
    bench = start(unit=SLOW, max_batch=1)
    holding = await bench.hold_device()
    tasks = await bench.in_order(*range(1, 40), within=math.inf)
    stopped.skip(500.0)
    bench.device.gate.set()
    await holding
    for image, task in enumerate(tasks, 1):
        reply = await task
        assert image_of(reply) == image
        assert reply.timing.slack is None
    assert bench.metric("tome_slo_met_total") == 1  # of the one that held the device
    assert bench.metric("tome_rejected_total", reason="infeasible") == 0


async def test_a_request_that_is_refused_once_it_is_decoded_is_forgotten(
    start: Callable[..., Bench], stopped: Clock
) -> None:
    bench = start(unit=SLOW)
    bench.decoder.gate.clear()
    task = bench.predict(1, within=10.0)
    await until(lambda: bench.decoder.decoded)
    stopped.skip(9.0)  # what is left is less than one image takes on the device
    bench.decoder.gate.set()
    await infeasible(task)
    assert bench.engine._batcher._unanswered == set()
    assert bench.device.batches == []


async def test_requests_with_a_deadline_go_before_those_without(start: Callable[..., Bench]) -> None:
    bench = start(max_batch=1)
    holding = await bench.hold_device()
    tasks = await bench.in_order(1, 2, within=math.inf) + await bench.in_order(3, within=500.0)
    bench.device.gate.set()
    await asyncio.gather(holding, *tasks)
    assert [images for *_, images in bench.device.batches] == [(0,), (3,), (1,), (2,)]


@pytest.mark.parametrize("policy", POLICIES)
async def test_every_policy_runs_requests_without_a_deadline(start: Callable[..., Bench], policy: str) -> None:
    bench = start(policy)
    holding = await bench.hold_device()
    tasks = await bench.in_order(*range(1, 20), within=math.inf)
    tasks += await bench.in_order(20, 21, within=500.0)
    bench.device.gate.set()
    replies = await asyncio.gather(holding, *tasks)
    assert [image_of(reply) for reply in replies] == list(range(22))
    assert bench.metric("tome_policy_failures_total") == 0


# Estimates that are wrong


async def test_an_idle_server_finds_out_by_itself_that_it_is_slow_no_more(
    start: Callable[..., Bench], clock: Clock
) -> None:
    bench = start(unit=SLOW)
    bench.device.slowness = 8.0
    for image in range(10):
        await bench.predict(image)
    assert bench.metric("tome_latency_drift_ratio") == pytest.approx(8)
    bench.device.slowness = 1.0
    before = len(bench.device.probes)
    await until(lambda: bench.settled)
    assert bench.metric("tome_latency_drift_ratio") == pytest.approx(1, abs=0.1)
    assert len(bench.device.probes) > before
    assert image_of(await bench.predict(98, within=2.0)) == 98


async def test_what_one_model_forgets_or_runs_leaves_the_clock_of_another_alone(
    start: Callable[..., Bench], stopped: Clock
) -> None:
    bench = start(unit=SLOW)
    bench.device.slowness = 8.0
    for model in ("first", "second"):
        for image in range(10):
            await bench.predict(image, model=model)
    latency = {name: served.scheduler.latency for name, served in bench.engine.registry.models.items()}
    stopped.skip(2.0)
    # Refused, by either model: its slowness of two seconds ago is forgotten by all but a sixteenth.
    for model in ("first", "second"):
        await asyncio.gather(bench.predict(99, model=model, within=0.1), return_exceptions=True)
        assert latency[model].drift < 1.2


async def test_a_model_without_batches_forgets_that_it_was_slow_though_another_keeps_the_device_busy(
    start: Callable[..., Bench], stopped: Clock
) -> None:
    bench = start(unit=SLOW)
    bench.device.slowness = 8.0
    for model in ("first", "second"):
        for image in range(10):
            await bench.predict(image, model=model)
    bench.device.slowness = 1.0
    for image in range(200):
        stopped.skip(5.0)
        await bench.predict(image, model="first")
    holding = await bench.hold_device()
    # What is expected of the batch on the device, and twice what the second model's own takes.
    second = bench.predict(98, model="second", within=10.0)
    await bench.queued(1)
    bench.device.gate.set()
    await asyncio.gather(holding, second)


async def test_a_profile_that_is_far_too_slow_is_corrected_by_an_idle_server(start: Callable[..., Bench]) -> None:
    bench = start(unit=SLOW)
    bench.device.slowness = 1 / 8
    await infeasible(bench.predict(1, within=0.5))
    # Too slow by eight times: 1.65 s are promised for what takes 0.19.
    await until(lambda: bench.settled)
    assert bench.metric("tome_latency_drift_ratio") == pytest.approx(1 / 8)
    assert image_of(await bench.predict(2, within=0.5)) == 2


async def test_an_idle_server_of_settled_predictions_runs_nothing_of_its_own(start: Callable[..., Bench]) -> None:
    bench = start()
    await until(lambda: bench.settled)
    probes = len(bench.device.probes)
    await asyncio.sleep(4 * PROBE_AFTER)
    assert len(bench.device.probes) == probes


async def test_empty_images_that_fail_harm_nothing(
    start: Callable[..., Bench], monkeypatch: pytest.MonkeyPatch
) -> None:
    bench = start()
    failed = asyncio.Event()

    async def broken(*_: object) -> float:
        failed.set()
        raise ValueError("no kernel for zeros")

    monkeypatch.setattr(bench.device, "probe", broken)
    await failed.wait()
    assert image_of(await bench.predict(3)) == 3


async def test_a_slow_way_back_refuses_no_longer_than_it_is_fresh(start: Callable[..., Bench], stopped: Clock) -> None:
    bench = start(unit=SLOW, max_batch=1)
    holding = await bench.hold_device()
    tasks = await bench.in_order(*range(1, 16))
    stopped.skip(4.0)  # as if the process had been stopped, with sixteen in flight
    bench.device.gate.set()
    await asyncio.gather(holding, *tasks)
    stopped.skip(FRESH + 0.1)
    assert image_of(await bench.predict(99, within=2.0)) == 99


async def test_one_kind_of_image_that_is_slow_to_decode_refuses_no_other(
    start: Callable[..., Bench], stopped: Clock
) -> None:
    bench = start(unit=SLOW)
    times = bench.engine._decoders.times
    bench.decoder.sizes[b"7"] = InputSize("16-bit PNG", 49.0, 1)
    for _ in range(9):
        times.add(stopped.loop.time(), "16-bit PNG", 49.0, 100.0, 100.0)
    assert (await infeasible(bench.predict(7, within=20.0))).smallest > 100
    assert bench.decoder.decoded == []
    assert image_of(await bench.predict(1, within=2.0)) == 1


async def test_images_that_wait_for_a_thread_are_reckoned_with_and_forgotten_once_they_are_gone(
    start: Callable[..., Bench], stopped: Clock
) -> None:
    bench = start(unit=SLOW, threads=1, max_batch=1)
    for _ in range(9):
        bench.engine._decoders.times.add(stopped.loop.time(), "scripted", 1.0, 10.0, 10.0)
    bench.decoder.gate.clear()
    tasks = [bench.predict(image, within=56.0) for image in range(5)]
    await until(lambda: bench.decoder.decoded and len(bench.engine._decoders) == 4)
    # Five times ten seconds before its own, with a quarter to spare, and the device.
    assert (await infeasible(bench.predict(9, within=57.0))).smallest == pytest.approx(50 + 12.5 + 1.65, abs=0.1)
    assert bench.gauge("tome_decode_queue_depth") == 4
    # One that is due before the four that wait goes before them.
    sooner = bench.predict(8, within=30.0)
    await until(lambda: len(bench.engine._decoders) == 5)
    bench.decoder.gate.set()
    for image, task in enumerate(tasks):
        assert image_of(await task) == image
    assert image_of(await sooner) == 8
    assert bench.decoder.decoded[1] == b"8"
    assert bench.gauge("tome_decode_queue_depth") == 0


async def test_an_image_that_cannot_be_decoded_in_time_any_more_is_refused_before_a_thread_is_spent_on_it(
    start: Callable[..., Bench], stopped: Clock
) -> None:
    bench = start(unit=SLOW, threads=1)
    bench.decoder.gate.clear()
    first = bench.predict(1, within=500.0)
    await until(lambda: bench.decoder.decoded == [b"1"])
    second = bench.predict(2, within=20.0)
    await until(lambda: len(bench.engine._decoders) == 1)
    stopped.skip(18.9)  # what is left is less than one image takes on the device
    bench.decoder.gate.set()
    error = await infeasible(second)
    assert error.smallest > 1.6
    assert image_of(await first) == 1
    assert bench.decoder.decoded == [b"1"]


async def test_requests_that_are_being_decoded_are_reckoned_with_at_admission(
    start: Callable[..., Bench], stopped: Clock
) -> None:
    bench = start(unit=SLOW, threads=1, max_batch=1)
    bench.decoder.gate.clear()
    # Each takes 1.5 s on the device, and 1.65 are promised: three of them are in time, though nothing waits there yet.
    tasks = [bench.predict(image, within=5.0) for image in range(5)]
    for task in tasks[3:]:
        assert (await infeasible(task)).smallest == pytest.approx(3 * 1.5 + 1.65, abs=0.01)
    bench.decoder.gate.set()
    assert [image_of(await task) for task in tasks[:3]] == [0, 1, 2]


# All of it at once


def drawn_bounds(chance: random.Random) -> dict[str, int | float]:
    """Bounds on r as a caller might set them; min_r and max_r are always among them."""
    if chance.random() < 0.3:
        r = chance.choice([0, 4, 7, 14, 20])
        return {"min_r": r, "max_r": r, **({"r": r} if chance.random() < 0.5 else {})}
    low, high = sorted(chance.choices(range(18), k=2))
    return {"min_r": low, "max_r": high}


@pytest.mark.parametrize("policy", POLICIES)
async def test_every_request_ends_in_exactly_one_answer_within_its_bounds(
    start: Callable[..., Bench], policy: str
) -> None:
    """Hundreds of requests with models, bounds, deadlines, cancellations, damage and failures drawn at random."""
    chance = random.Random(policy)
    bench = start(
        policy,
        chance.choice([QUICK, 1e-3]),
        max_batch=chance.choice([1, 3, 8]),
        max_delay=chance.choice([0, 0.002]),
        max_pending=chance.choice([20, 1000]),
        threads=chance.choice([1, 4]),
    )
    count = 300
    images = range(1, count + 1)
    bench.device.poison = set(chance.sample(images, 20))
    damaged = set(chance.sample(images, 20))
    tasks: dict[int, asyncio.Task[Reply]] = {}
    models: dict[int, str] = {}
    bounds: dict[int, dict[str, int | float]] = {}
    cancelled: set[int] = set()
    ended_unseen: set[int] = set()
    short_of_memory = chance.random() < 0.5

    async def disturb() -> None:
        """Stop the device and the decoders now and then, and take the device's memory away."""
        while True:
            for gate in (bench.device.gate, bench.decoder.gate):
                gate.clear() if chance.random() < 0.3 else gate.set()
            bench.device.room = chance.choice([0, 1, 3]) if short_of_memory and chance.random() < 0.2 else 1000
            await asyncio.sleep(chance.random() * 0.004)

    disturbing = asyncio.create_task(disturb())
    for image in images:
        models[image], bounds[image] = chance.choice(["first", "second"]), drawn_bounds(chance)
        within = chance.choice([0.0, 0.001, 0.005, 0.02, 0.1, LATE, LATE, math.inf])
        bench.device.deadlines[image] = asyncio.get_running_loop().time() + within
        name = f"damaged {image}" if image in damaged else image
        tasks[image] = bench.predict(name, model=models[image], within=within, **bounds[image])
        tasks[image].add_done_callback(lambda _, image=image: bench.device.seen[image] or ended_unseen.add(image))
        if chance.random() < 0.3:
            await asyncio.sleep(chance.random() * 0.003)
        unanswered = [image for image, task in tasks.items() if not task.done()]
        if unanswered and chance.random() < 0.2:
            victim = chance.choice(unanswered)
            tasks[victim].cancel()
            cancelled.add(victim)
    await asyncio.sleep(0)
    disturbing.cancel()
    bench.device.gate.set()
    bench.decoder.gate.set()
    async with asyncio.timeout(60):
        ends = dict(zip(tasks, await asyncio.gather(*tasks.values(), return_exceptions=True), strict=True))

    for image, end in ends.items():
        if isinstance(end, Reply):
            assert image_of(end) == image
            assert end.model.name == models[image]
            assert end.r == bench.device.r_of(image)
            assert bench.device.seen[image] >= 1
            assert image not in bench.device.poison | damaged
        elif isinstance(end, asyncio.CancelledError):
            assert image in cancelled
        elif isinstance(end, InvalidRequestError):
            assert image in damaged
        elif isinstance(end, ModelFailedError):
            assert image in bench.device.poison
        elif isinstance(end, NoMemoryError):
            assert short_of_memory
        elif isinstance(end, OverloadedError):
            assert bench.engine.max_pending == 20
        elif isinstance(end, InfeasibleError):
            assert bench.device.seen[image] == 0
            assert end.smallest > 0
        else:
            assert isinstance(end, ExpiredError)
        if isinstance(end, InvalidRequestError | OverloadedError) or getattr(end, "stage", "") in ("decode", "queue"):
            assert bench.device.seen[image] == 0
    # Once, and again alone if a batch-mate failed; up to three more times if memory ran out.
    assert max(bench.device.seen.values()) <= (4 if short_of_memory else 2)
    # Nobody who has been answered, or has gone, is run for it any more.
    assert not any(bench.device.seen[image] for image in ended_unseen)
    for name, rs, batch in bench.device.batches:
        assert {models[image] for image in batch} == {name}
        for r, image in zip(rs, batch, strict=True):
            assert bounds[image]["min_r"] <= r <= bounds[image]["max_r"]
    replies = sum(isinstance(end, Reply) for end in ends.values())
    assert replies > 0
    registry = bench.engine.metrics.registry
    counted = sum(
        registry.get_sample_value("tome_request_duration_seconds_count", {"model": name}) or 0
        for name in ("first", "second")
    )
    assert counted == replies, generate_latest(registry).decode()


async def test_all_are_answered_once_the_last_is(bench: Bench) -> None:
    await bench.engine.drained()
    holding = await bench.hold_device()
    queued = await bench.in_order(1, 2)
    bench.engine.drain()
    answered = asyncio.create_task(bench.engine.drained())
    assert isinstance(await refused(bench.predict(3)), UnavailableError)
    bench.device.step()
    await holding
    await asyncio.sleep(0)
    assert not answered.done()
    bench.device.gate.set()
    await answered
    assert [image_of(await task) for task in queued] == [1, 2]


# Models that come and go, and a device that dies


async def retire(bench: Bench, name: str) -> None:
    await bench.engine.registry.left(bench.engine.registry.retire(name))


async def test_a_retired_model_answers_what_it_has_and_refuses_the_rest(bench: Bench) -> None:
    holding = await bench.hold_device()
    queued = await bench.in_order(1, 2)
    retiring = asyncio.create_task(retire(bench, "first"))
    await asyncio.sleep(0)
    assert isinstance(await refused(bench.predict(3, model="first")), UnknownModelError)
    other = bench.predict(4, model="second")
    bench.device.gate.set()
    assert image_of(await other) == 4
    assert [image_of(reply) for reply in await asyncio.gather(holding, *queued)] == [0, 1, 2]
    await retiring
    assert "first" not in bench.engine.registry.models
    assert not bench.engine.registry.leaving
    assert bench.engine.registry.default_name == "second"


async def test_a_replaced_model_answers_what_it_has_and_its_successor_the_rest(bench: Bench) -> None:
    holding = await bench.hold_device()
    queued = await bench.in_order(1, 2)
    before = bench.engine.registry.models["first"]
    after = ServedModel(before.model, before.profile, "max_batch", "first#2")
    assert bench.engine.registry.serve(after) is before
    leaving = asyncio.create_task(bench.engine.registry.left(before))
    later = bench.predict(3)
    bench.device.gate.set()
    assert [image_of(reply) for reply in await asyncio.gather(holding, *queued, later)] == [0, 1, 2, 3]
    await leaving
    assert {image: key for key, _, images in bench.device.batches for image in images} == {
        0: "first", 1: "first", 2: "first", 3: "first#2",
    }  # fmt: skip
    assert not bench.engine.registry.leaving


@pytest.mark.parametrize("change", ["replaced", "retired"])
async def test_requests_of_a_model_that_is_held_are_answered_by_it_whatever_becomes_of_it(
    bench: Bench, change: str
) -> None:
    before = bench.engine.registry.models["first"]
    with bench.engine.registry.holding(before):
        if change == "replaced":
            bench.engine.registry.serve(ServedModel(before.model, before.profile, "max_batch", "first#2"))
        else:
            bench.engine.registry.retire("first")
        leaving = asyncio.create_task(bench.engine.registry.left(before))
        assert image_of(await bench.engine.predict(bench.request(7), before)) == 7
        assert bench.device.batches[-1][0] == before.key
        assert not leaving.done()
    await leaving
    assert not bench.engine.registry.leaving


async def test_all_images_of_a_request_are_answered_by_one_model_though_it_is_replaced_before_they_start(
    bench: Bench,
) -> None:
    before = bench.engine.registry.models["first"]
    images = InferRequest("first", Tensor("image", "BYTES", (2,), [b"1", b"2"]), outputs=[RequestedOutput("class_id")])
    arrival = asyncio.get_running_loop().time()
    answering = asyncio.create_task(OpenInference(bench.engine).infer(images, arrival, None))
    # It has gone as far as to have a task for each image, none of which has begun.
    await asyncio.sleep(0)
    assert bench.gauge("tome_requests_pending") == 0
    successor = replace(before.model, version=2)
    bench.engine.registry.serve(ServedModel(successor, before.profile, "max_batch", "first#2"))
    leaving = asyncio.create_task(bench.engine.registry.left(before))
    response = await answering
    assert response.version == "1"
    assert {key for key, *_ in bench.device.batches} == {before.key}
    await leaving
    images = replace(images, version="2")
    assert (await OpenInference(bench.engine).infer(images, arrival, None)).version == "2"


async def test_a_retired_model_is_let_go_only_after_a_batch_whose_callers_have_gone(bench: Bench) -> None:
    holding = await bench.hold_device()
    holding.cancel()
    await asyncio.sleep(0)
    retiring = asyncio.create_task(retire(bench, "first"))
    for _ in range(5):
        await asyncio.sleep(0)
    assert not retiring.done()
    bench.device.gate.set()
    await retiring


async def test_a_model_that_is_expected_is_unavailable_until_it_is_served(bench: Bench) -> None:
    served = bench.engine.registry.models["first"]
    await retire(bench, "first")
    assert isinstance(await refused(bench.predict(1, model="first")), UnknownModelError)
    bench.engine.registry.expect("first")
    assert isinstance(await refused(bench.predict(1, model="first")), UnavailableError)
    assert bench.engine.registry.serve(served) is None
    assert image_of(await bench.predict(1, model="first")) == 1


async def test_without_any_model_requests_are_refused(bench: Bench) -> None:
    for name in list(bench.engine.registry.models):
        await retire(bench, name)
    bench.engine.registry.forget("third")
    assert isinstance(await refused(bench.predict(1)), UnavailableError)
    assert isinstance(await refused(bench.predict(1, model="first")), UnknownModelError)


async def test_when_the_device_dies_everybody_gets_a_status(clock: Clock, bundled: ModelInfo) -> None:
    profile = profile_of(QUICK, 8)
    device, decoder = ScriptedDevice(profile), ScriptedDecoder(bundled.preprocess.settings)
    decoder.gate.set()
    served = ServedModel(replace(bundled, name="first", preprocess=decoder, default_budget=LATE), profile, "max_batch")
    engine = Engine(
        device, Metrics(), max_delay=0.0, max_pending=100, reply_margin=0.0001, decode_threads=1,
        names=["first"],
    )  # fmt: skip
    engine.registry.serve(served)
    running = asyncio.create_task(engine.run())
    bench = Bench(engine, device, decoder)
    on_device = await bench.hold_device()
    queued = await bench.in_order(1, 2)
    device.dead = True
    device.step()
    for task in (on_device, *queued, bench.predict(3)):
        assert isinstance(await refused(task), UnavailableError)
    with pytest.raises(DeviceDiedError):
        await running
    assert engine.metrics.registry.get_sample_value("tome_requests_pending") == 0
    engine.close()
