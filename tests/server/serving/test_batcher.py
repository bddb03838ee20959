"""How batches are formed, run and answered, seen from the engine's door."""

import asyncio
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from tests.server.scripted import (
    LATE,
    QUICK,
    RS,
    SLOW,
    SOON,
    TOP,
    Bench,
    Clock,
    image_of,
    profile_of,
    refused,
    until,
    use,
)
from tome_server.config.model_overrides import BatchingOverrides, ModelOverrides
from tome_server.errors import ModelFailedError, NoMemoryError
from tome_server.models.model_info import ModelInfo
from tome_server.scheduling.policy.view import Decision, Policy, View, uniform
from tome_server.serving.requests import Reply
from tome_server.serving.served import ServedModel

# Formed


async def test_what_comes_while_the_device_is_busy_shares_a_batch(bench: Bench) -> None:
    await bench.hold_device()
    tasks = await bench.in_order(1, 2, 3)
    bench.device.gate.set()
    replies = await asyncio.gather(*tasks)
    assert [image_of(reply) for reply in replies] == [1, 2, 3]
    assert [reply.timing.batch_size for reply in replies] == [3, 3, 3]


async def test_a_batch_holds_no_more_than_it_may(start: Callable[..., Bench]) -> None:
    bench = start(max_batch=3)
    await bench.hold_device()
    tasks = await bench.in_order(*range(1, 9))
    bench.device.gate.set()
    await asyncio.gather(*tasks)
    assert [images for *_, images in bench.device.batches] == [(0,), (1, 2, 3), (4, 5, 6), (7, 8)]


async def test_a_batch_starts_once_full_without_waiting_out_its_delay(start: Callable[..., Bench]) -> None:
    bench = start(max_batch=2, max_delay=LATE)
    tasks = await bench.in_order(1)
    tasks += [bench.predict(2)]
    await asyncio.gather(*tasks)
    assert bench.device.batches == [("first", (0, 0), (1, 2))]


async def test_a_batch_that_never_fills_starts_after_its_delay(start: Callable[..., Bench]) -> None:
    bench = start(max_batch=8, max_delay=SOON)
    assert image_of(await bench.predict(1)) == 1


class Waits:
    """A policy that lets the first request wait for its mates."""

    def __call__(self, view: View) -> Decision:
        return uniform(view.waiting, 0)

    def patience(self, _: View) -> float:
        return SOON


async def test_the_device_waits_for_mates_as_long_as_the_policy_wants(
    start: Callable[..., Bench], monkeypatch: pytest.MonkeyPatch, stopped: Clock
) -> None:
    use(monkeypatch, Waits())
    bench = start()
    tasks = await bench.in_order(1, 2)
    assert bench.device.batches == []
    stopped.skip(SOON)
    await asyncio.gather(*tasks)
    assert bench.device.batches == [("first", (0, 0), (1, 2))]


async def test_a_batch_holds_one_model_and_each_member_its_own_r(bench: Bench) -> None:
    await bench.hold_device()
    tasks = []
    for image in range(1, 13):
        model, r = ["first", "second"][image % 2], [0, 4, 7][image % 3]
        tasks += await bench.in_order(image, model=model, r=r)
    bench.device.gate.set()
    replies = await asyncio.gather(*tasks)
    for image, reply in enumerate(replies, 1):
        assert image_of(reply) == image
        assert (reply.model.name, reply.r) == (["first", "second"][image % 2], [0, 4, 7][image % 3])
    assert bench.device.batches[1:] == [
        ("second", (4, 0, 7, 4, 0, 7), (1, 3, 5, 7, 9, 11)),
        ("first", (7, 4, 0, 7, 4, 0), (2, 4, 6, 8, 10, 12)),
    ]


async def test_the_earliest_deadline_goes_first_whatever_its_model_and_r(start: Callable[..., Bench]) -> None:
    bench = start(max_batch=1)
    await bench.hold_device()
    tasks = []
    for image, within in ((1, math.inf), (2, 400), (3, 200), (4, 300), (5, 100), (6, math.inf)):
        tasks += await bench.in_order(image, within=within, model=["first", "second"][image % 2], r=image)
    bench.device.gate.set()
    await asyncio.gather(*tasks)
    assert [images for *_, images in bench.device.batches] == [(0,), (5,), (3,), (4,), (2,), (1,), (6,)]


# Callers who go


async def a_batch_that_the_second_of_three_left(bench: Bench) -> list[asyncio.Task[Reply]]:
    """The calls of a batch that is on the device, and stays there until its gate is opened."""
    holding = await bench.hold_device()
    tasks = await bench.in_order(1, 2, 3)
    bench.device.step()
    await holding
    assert await bench.device.started.get() == (1, 2, 3)
    tasks[1].cancel()
    with pytest.raises(asyncio.CancelledError):
        await tasks[1]
    return tasks


async def test_batch_mates_of_a_request_cancelled_on_the_device_are_answered(bench: Bench) -> None:
    tasks = await a_batch_that_the_second_of_three_left(bench)
    assert bench.gauge("tome_requests_pending") == 2
    bench.device.gate.set()
    assert [image_of(reply) for reply in await asyncio.gather(tasks[0], tasks[2])] == [1, 3]


async def test_a_batch_whose_callers_have_all_gone_does_no_harm(bench: Bench) -> None:
    holding = await bench.hold_device()
    holding.cancel()
    with pytest.raises(asyncio.CancelledError):
        await holding
    bench.device.gate.set()
    assert image_of(await bench.predict(1)) == 1


async def test_the_device_sleeps_on_when_the_only_request_is_cancelled(
    start: Callable[..., Bench], stopped: Clock
) -> None:
    """It waited for batch-mates; what it waited with is gone."""
    bench = start(max_delay=SOON)
    (gone,) = await bench.in_order(1)
    gone.cancel()
    with pytest.raises(asyncio.CancelledError):
        await gone
    (other,) = await bench.in_order(2)
    stopped.skip(SOON)
    assert image_of(await other) == 2
    assert bench.device.seen == {2: 1}


# Failed


async def test_only_the_image_that_a_model_fails_on_fails(bench: Bench) -> None:
    holding = await bench.hold_device()
    bench.device.poison = {2}
    tasks = await bench.in_order(1, 2, 3)
    bench.device.gate.set()
    await holding
    error = await refused(tasks[1])
    assert isinstance(error, ModelFailedError)
    assert str(error) == "model first failed on this input"
    replies = await asyncio.gather(tasks[0], tasks[2])
    assert [image_of(reply) for reply in replies] == [1, 3]
    assert [reply.timing.batch_size for reply in replies] == [1, 1]
    assert bench.device.seen == {0: 1, 1: 2, 2: 2, 3: 2}


async def test_a_model_that_fails_goes_on_to_the_next_image(bench: Bench) -> None:
    bench.device.poison = {1}
    assert isinstance(await refused(bench.predict(1)), ModelFailedError)
    assert bench.device.seen == {1: 1}
    assert image_of(await bench.predict(2)) == 2


async def test_what_was_cancelled_is_not_run_again_after_a_failure(bench: Bench) -> None:
    bench.device.poison = {3}
    tasks = await a_batch_that_the_second_of_three_left(bench)
    bench.device.gate.set()
    assert isinstance(await refused(tasks[2]), ModelFailedError)
    assert image_of(await tasks[0]) == 1
    assert bench.device.seen == {0: 1, 1: 2, 2: 1, 3: 2}


async def test_a_batch_that_memory_is_too_small_for_is_halved_until_it_fits(
    bench: Bench, caplog: pytest.LogCaptureFixture
) -> None:
    await bench.hold_device()
    bench.device.room = 2
    tasks = await bench.in_order(*range(1, 8))
    bench.device.gate.set()
    replies = await asyncio.gather(*tasks)
    assert [image_of(reply) for reply in replies] == list(range(1, 8))
    assert [images for *_, images in bench.device.batches[1:]] == [
        (1, 2, 3, 4, 5, 6, 7),
        (1, 2, 3, 4),
        (1, 2),
        (3, 4),
        (5, 6),
        (7,),
    ]
    assert [reply.timing.batch_size for reply in replies] == [2, 2, 2, 2, 2, 2, 1]
    assert [message for message in caplog.messages if "lacks memory" in message] == [
        f"model first lacks memory for a batch of {size}; running its halves, and from now on no more than {half} at "
        "once, until it is loaded anew: tried to allocate too much"
        for size, half in ((7, 4), (4, 2))
    ]
    assert bench.metric("tome_halved_batches_total") == 2


async def test_a_size_that_memory_was_too_small_for_is_not_tried_again(bench: Bench, bundled: ModelInfo) -> None:
    async def sizes(first: int, model: str) -> list[int]:
        bench.device.gate.clear()
        holding = bench.predict(0, model=model)
        await until(lambda: bench.device.running)
        tasks = await bench.in_order(*range(first, first + 8), model=model)
        bench.device.gate.set()
        return [reply.timing.batch_size for reply in (await asyncio.gather(holding, *tasks))[1:]]

    bench.device.room = 5
    assert await sizes(10, "first") == 8 * [4]
    tried = len(bench.device.batches)
    bench.device.room = 4
    assert await sizes(20, "first") == 8 * [4]
    assert len(bench.device.batches) == tried + 3
    # It is of one model, and ends with it.
    bench.device.room = 1000
    assert await sizes(30, "second") == 8 * [8]
    profile = profile_of(QUICK, 8)
    anew = replace(bundled, name="first", preprocess=bench.decoder, default_budget=LATE)
    before = bench.engine.registry.serve(ServedModel(anew, profile, "max_batch", "anew"))
    assert before
    await bench.engine.registry.left(before)
    assert await sizes(40, "first") == 8 * [8]


async def test_halves_keep_the_r_of_each_image_and_leave_out_who_has_gone(bench: Bench) -> None:
    holding = await bench.hold_device()
    bench.device.room = 2
    tasks = [task for image in range(1, 6) for task in await bench.in_order(image, r=2 * image)]
    bench.device.step()
    await holding
    assert await bench.device.started.get() == (1, 2, 3, 4, 5)
    for gone in (tasks[1], tasks[3], tasks[4]):
        gone.cancel()
        with pytest.raises(asyncio.CancelledError):
            await gone
    bench.device.gate.set()
    assert [(await task).r for task in (tasks[0], tasks[2])] == [2, 6]
    assert [(rs, images) for _, rs, images in bench.device.batches[2:]] == [((2, 6), (1, 3))]


async def test_one_image_that_there_is_no_memory_for_is_refused_and_the_server_goes_on(
    bench: Bench, caplog: pytest.LogCaptureFixture
) -> None:
    await bench.hold_device()
    bench.device.room = 0
    tasks = await bench.in_order(1, 2, 3)
    bench.device.gate.set()
    for task in tasks:
        error = await refused(task)
        assert isinstance(error, NoMemoryError)
        assert str(error) == "model first has no memory left on the device for this image"
    assert bench.device.seen[1] == 3
    assert "model first lacks memory for one image: tried to allocate too much" in caplog.messages
    bench.device.room = 1
    assert image_of(await bench.predict(4)) == 4
    # Those, and what held the device.
    assert bench.metric("tome_slo_missed_total", reason="failed") == 4


async def test_a_model_that_fails_on_an_image_of_half_a_batch_fails_on_that_alone(bench: Bench) -> None:
    await bench.hold_device()
    bench.device.room, bench.device.poison = 2, {3}
    tasks = await bench.in_order(1, 2, 3, 4)
    bench.device.gate.set()
    assert isinstance(await refused(tasks[2]), ModelFailedError)
    assert [image_of(await tasks[i]) for i in (0, 1, 3)] == [1, 2, 4]


async def test_a_model_may_wait_for_mates_where_others_do_not(start: Callable[..., Bench]) -> None:
    bench = start(max_batch=2, second=ModelOverrides(batching=BatchingOverrides(max_delay=LATE)))
    waits = await bench.in_order(1, model="second")
    assert await bench.predict(
        2, model="first"
    )  # meanwhile the device wasn't idle, so that there was nothing to wait for
    assert image_of(await waits[0]) == 1
    waits = await bench.in_order(3, model="second")
    await asyncio.gather(bench.predict(4, model="second"), *waits)
    assert [images for *_, images in bench.device.batches] == [(1,), (2,), (3, 4)]


@pytest.mark.parametrize("packed", [True, False])
async def test_members_of_one_batch_get_an_r_each_in_one_call(start: Callable[..., Bench], packed: bool) -> None:
    bench = start("fixed:8", one_call=packed)
    await bench.hold_device()
    tasks = await bench.in_order(1)
    for image, bounds in enumerate(({"max_r": 2}, {"min_r": 12}, {"r": 5}, {"min_r": 3, "max_r": 5}, {"r": 98}), 2):
        tasks += await bench.in_order(image, **bounds)
    bench.device.gate.set()
    assert [reply.r for reply in await asyncio.gather(*tasks)] == [8, 2, 12, 5, 4, 98]
    assert bench.device.batches[1:] == [("first", (8, 2, 12, 5, 4, 98), (1, 2, 3, 4, 5, 6))]
    assert bench.device.packed == {packed}


# Counted


async def test_how_far_predictions_are_off_is_counted(start: Callable[..., Bench]) -> None:
    bench = start(unit=SLOW)
    for slowness in (2.0, 0.5):
        bench.device.slowness = slowness
        await bench.predict(1, r=0)
    assert bench.metric("tome_latency_prediction_ratio_count") == 2
    # One batch alone doesn't make the device slow: of the second, as much was expected as of the first.
    assert bench.metric("tome_latency_prediction_ratio_sum") == pytest.approx(2.5, rel=0.1)
    assert bench.metric("tome_compute_seconds_total") == pytest.approx(2.0 * 2.0 + 0.5 * 2.0)


async def test_speedup_is_the_time_taken_against_the_profile_at_r_0(start: Callable[..., Bench]) -> None:
    bench = start(unit=SLOW)
    await bench.predict(1, r=0)
    assert bench.metric("tome_speedup_ratio_sum") == pytest.approx(1.0, rel=0.01)
    # Two units at r = 0 and 1.5 at the most merging, whatever operations that saves.
    await bench.predict(2, r=TOP)
    assert bench.metric("tome_speedup_ratio_sum") - 1 == pytest.approx(2.0 / 1.5, rel=0.01)
    # A stalled batch is not the merging's fault, but it is no speedup either.
    bench.device.slowness = 3.0
    await bench.predict(3, r=TOP)
    assert bench.metric("tome_speedup_ratio_bucket", le="0.5") == 1
    assert bench.metric("tome_speedup_ratio_count") == 3


async def test_a_machine_that_has_slowed_is_no_loss_of_speedup(start: Callable[..., Bench]) -> None:
    bench = start(unit=SLOW)
    assert bench.metric("tome_latency_drift_ratio") == 1
    bench.device.slowness = 2.0
    for image in range(12):
        await bench.predict(image, r=TOP)
    assert bench.metric("tome_latency_drift_ratio") == pytest.approx(2.0, rel=0.01)
    before = bench.metric("tome_speedup_ratio_sum")
    await bench.predict(13, r=TOP)
    # Unmerged, it would have taken twice as long as profiled as well.
    assert bench.metric("tome_speedup_ratio_sum") - before == pytest.approx(2.0 / 1.5, rel=0.05)


async def test_a_batch_within_what_was_promised_is_counted_apart_from_one_that_was_not(bench: Bench) -> None:
    await bench.predict(1)
    assert bench.metric("tome_latency_promises_total", promise="kept") == 1
    bench.device.slowness = 2.0  # promised is a tenth more than expected
    await bench.predict(2)
    assert bench.metric("tome_latency_promises_total", promise="kept") == 1
    assert bench.metric("tome_latency_promises_total", promise="broken") == 1


async def test_the_device_time_of_those_who_went_is_counted_as_wasted(
    start: Callable[..., Bench], clock: Clock
) -> None:
    bench = start("fixed:0", unit=SLOW)
    holding = await bench.hold_device()
    bench.device.slowness = 2.0
    kept, gone, late = [*await bench.in_order(1, 2), *await bench.in_order(3, within=50.0)]
    bench.device.step()
    await holding
    assert sorted(await bench.device.started.get()) == [1, 2, 3]
    assert bench.metric("tome_compute_wasted_seconds_total") == 0
    gone.cancel()
    clock.skip(50.0)
    assert (await refused(late)).stage == "compute"
    bench.device.gate.set()
    assert image_of(await kept) == 1
    with pytest.raises(asyncio.CancelledError):
        await gone
    # Three at r = 0 are expected to take 4, and took 8; the one before took 2 or twice that.
    assert bench.metric("tome_compute_wasted_seconds_total") == pytest.approx(8.0 * 2 / 3)
    assert bench.metric("tome_compute_seconds_total") > 8.0


async def test_what_nobody_waits_for_any_more_is_not_run(start: Callable[..., Bench], clock: Clock) -> None:
    bench = start(unit=SLOW)
    await bench.hold_device()
    gone, late, kept = [*await bench.in_order(1), *await bench.in_order(2, within=50.0), *await bench.in_order(3)]
    gone.cancel()
    clock.skip(50.0)
    assert (await refused(late)).stage == "queue"
    bench.device.gate.set()
    assert image_of(await kept) == 3
    with pytest.raises(asyncio.CancelledError):
        await gone
    assert bench.device.seen == {0: 1, 3: 1}
    assert bench.metric("tome_compute_wasted_seconds_total") == 0


# A policy that is wrong


def raises(view: View) -> Decision:
    raise ZeroDivisionError("of course")


def breaks_bounds(view: View) -> Decision:
    return Decision(view.waiting[:1], [len(RS) - 1])


def invents(view: View) -> Decision:
    return Decision([replace(view.waiting[0])], [view.waiting[0].low])


def does_nothing(view: View) -> Decision:
    return Decision((), ())


def answers_nonsense(view: View) -> Any:
    return None


@pytest.mark.parametrize("policy", [raises, breaks_bounds, invents, does_nothing, answers_nonsense])
async def test_without_a_policy_that_works_the_server_goes_on_and_says_so(
    start: Callable[..., Bench], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, policy: Policy
) -> None:
    use(monkeypatch, policy)
    bench = start()
    await bench.hold_device()
    tasks = await bench.in_order(1, 2, max_r=4) + await bench.in_order(3, min_r=3, max_r=3)
    bench.device.gate.set()
    assert [reply.r for reply in await asyncio.gather(*tasks)] == [4, 4, 3]
    assert bench.metric("tome_policy_failures_total") >= 1
    assert "the policy failed; running the earliest deadlines at their most merging" in caplog.text


async def test_a_policy_that_fails_once_is_asked_again(
    start: Callable[..., Bench], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = 0

    def fails_at_first(view: View) -> Decision:
        nonlocal asked
        asked += 1
        return uniform(view.waiting, 3) if asked > 1 else raises(view)

    use(monkeypatch, fails_at_first)
    bench = start()
    assert [(await bench.predict(1)).r for _ in range(3)] == [TOP, RS[3], RS[3]]
    assert bench.metric("tome_policy_failures_total") == 1
