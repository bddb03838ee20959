from __future__ import annotations

import asyncio
import math
import time
from dataclasses import replace

import grpc
import pytest
from google.rpc import error_details_pb2

from tests.client.peer import Failure, Peer
from tome_client import PredictOptions, TomeError
from tome_client.load import (
    BudgetClass,
    LoadPlan,
    Progress,
    Renewal,
    Sample,
    event_loop,
    parse_budgets,
    run_load,
    summarize,
)

SAMPLES = [Sample("a.png", b"first", "Coat"), Sample("b.png", b"second", "Trouser")]
CONSTANT = Renewal(50, cv2=0)
PLAN = LoadPlan(SAMPLES, CONSTANT, parse_budgets("20s"), duration=0.5)
INFEASIBLE = error_details_pb2.ErrorInfo(reason="INFEASIBLE", domain="tome", metadata={"smallest_latency_ms": "31"})


def predictions(peer: Peer) -> list:
    """The calls but for the one that asks what is served."""
    return [call for call in peer.calls if hasattr(call.request, "latency_budget")]


async def test_every_request_is_sent_and_answered(peer: Peer) -> None:
    result = await run_load(peer.target, PLAN)
    assert len(result.outcomes) == len(predictions(peer)) == 25
    assert all(one.answered and one.attained and one.code == "OK" for one in result.outcomes)
    assert sorted(one.at for one in result.outcomes) == [one.at for one in PLAN.schedule()]
    assert all(0 <= one.lag <= one.latency for one in result.outcomes)
    assert (result.duration, result.stopped, result.model.summary.name) == (0.5, False, "fashion")
    assert result.outcomes[0].merging.tokens_out == 101
    assert result.outcomes[0].timing.total == pytest.approx(0.01234)


async def test_requests_carry_image_options_budget_and_a_later_deadline(peer: Peer) -> None:
    options = PredictOptions(model="m", r=8, min_r=2, max_r=9, min_quality=0.9, features=True)
    await run_load(peer.target, replace(PLAN, options=options), metadata=[("authorization", "Bearer x")])
    assert peer.calls[0].request.model == "m"
    assert {call.request.image for call in predictions(peer)} == {b"first", b"second"}
    for call in predictions(peer):
        request = call.request
        assert request.latency_budget.ToMilliseconds() == 20_000
        assert (request.model, request.r, request.min_r, request.max_r, request.min_quality) == ("m", 8, 2, 9, 0.9)
        assert (request.top_k, request.return_features) == (1, False)
        # gRPC rounds deadlines up on the wire, by about 1 %.
        assert 10 < call.time_remaining <= 21.3
        assert call.metadata["authorization"] == "Bearer x"


async def test_the_budget_can_be_the_grpc_deadline_alone(peer: Peer) -> None:
    await run_load(peer.target, replace(PLAN, deadline_only=True))
    for call in predictions(peer):
        assert not call.request.HasField("latency_budget")
        assert 0 < call.time_remaining <= 20.3


@pytest.mark.parametrize("budget", [math.inf, 1e12])
async def test_a_budget_that_is_none_or_endless_is_no_grpc_deadline(budget: float, peer: Peer) -> None:
    result = await run_load(peer.target, replace(PLAN, budgets=[BudgetClass(budget)], duration=0.1))
    assert all(one.attained for one in result.outcomes)
    assert all((call.time_remaining or 1e9) > 1e6 for call in predictions(peer))
    assert {call.request.no_deadline for call in predictions(peer)} == {budget == math.inf}


async def test_the_warm_up_is_sent_and_not_counted(peer: Peer) -> None:
    result = await run_load(peer.target, replace(PLAN, warmup=0.2))
    assert len(predictions(peer)) == 35
    assert len(result.outcomes) == 25


async def test_answers_are_judged_by_the_labels(peer: Peer) -> None:
    # The peer's best class is Coat, 4.
    result = await run_load(peer.target, PLAN)
    assert all(one.right == (one.image == "a.png") for one in result.outcomes)
    assert summarize(result).total.effective_accuracy == pytest.approx(0.5, abs=0.05)


async def test_a_label_that_the_model_does_not_have_ends_it_before_it_begins(peer: Peer) -> None:
    with pytest.raises(
        ValueError, match=r"a\.png is labelled 'Hat', which is neither the name nor .* of the 2 classes of fashion"
    ):
        await run_load(peer.target, replace(PLAN, samples=[Sample("a.png", b"", "Hat")]))
    assert not predictions(peer)


async def test_failures_are_outcomes_and_nothing_is_tried_twice(peer: Peer) -> None:
    peer.failures.extend(
        [
            None,  # Of the call that asks what is served.
            Failure(grpc.StatusCode.UNAVAILABLE, "loading"),
            Failure(grpc.StatusCode.DEADLINE_EXCEEDED, "too soon", details=(INFEASIBLE,)),
        ]
    )
    result = await run_load(peer.target, PLAN)
    assert len(predictions(peer)) == 25
    failures = {one.code: one for one in result.outcomes if not one.answered}
    assert failures.keys() == {"UNAVAILABLE", "DEADLINE_EXCEEDED"}
    assert failures["DEADLINE_EXCEEDED"].reason == "INFEASIBLE"
    assert failures["UNAVAILABLE"].right is False
    assert not failures["UNAVAILABLE"].attained


async def test_a_server_that_stalls_is_charged_for_all_that_arrived_meanwhile(peer: Peer) -> None:
    """No coordinated omission: a loop that waits for answers would see one slow request."""

    held = 20

    def stall(progress: Progress) -> None:
        if progress.sent < held:
            peer.hold.clear()
        else:
            peer.hold.set()

    plan = replace(PLAN, duration=1.5)
    result = await run_load(peer.target, plan, progress=stall)
    assert len(result.outcomes) == 75
    answered = [one.at + one.latency for one in sorted(result.outcomes, key=lambda one: one.at)]
    # Each waited for the last of them to come, as much less as it came later. The first may have come before the stall.
    assert min(answered[2:held]) >= plan.schedule()[held - 1].at


async def test_a_generator_that_lags_charges_itself(peer: Peer) -> None:
    def block(progress: Progress) -> None:
        time.sleep(0.1)

    summary = summarize(await run_load(peer.target, replace(PLAN, duration=1), progress=block))
    assert summary.lag.max > 0.05
    assert summary.total.latency.max >= summary.lag.max
    assert not summary.kept_schedule
    assert "the load generator did not keep its schedule" in summary.verdict.reasons


async def test_no_answer_is_given_up_after_budget_and_grace(peer: Peer) -> None:
    def hold(progress: Progress) -> None:
        peer.hold.clear()

    plan = LoadPlan(SAMPLES, CONSTANT, parse_budgets("50ms"), duration=0.2, grace=0.1)
    result = await run_load(peer.target, plan, progress=hold)
    assert {one.code for one in result.outcomes} == {"DEADLINE_EXCEEDED"}
    assert all(0.14 < one.latency < 10 for one in result.outcomes)


async def test_it_stops_when_told_and_keeps_what_was_measured(peer: Peer) -> None:
    stop = asyncio.Event()

    def after_some(progress: Progress) -> None:
        if progress.ended >= 5:
            peer.hold.clear()
            stop.set()

    result = await run_load(peer.target, replace(PLAN, duration=60), progress=after_some, stop=stop)
    assert result.stopped
    assert 5 <= len(result.outcomes) < 60 * 50
    assert 0 < result.duration < 60


async def test_it_can_be_stopped_while_it_waits_for_the_server(peer: Peer) -> None:
    peer.hold.clear()
    stop = asyncio.Event()
    running = asyncio.create_task(run_load(peer.target, PLAN, stop=stop))
    await asyncio.to_thread(peer.called.wait, 60)
    stop.set()
    with pytest.raises(TomeError, match="CANCELLED: stopped before the run began"):
        await running


async def test_progress_counts_only_requests_with_a_deadline_as_in_time(peer: Peer) -> None:
    seen: list[Progress] = []
    await run_load(peer.target, replace(PLAN, budgets=parse_budgets("none"), duration=0.8), progress=seen.append)
    assert seen[-1].ended > 0
    assert (seen[-1].judged, seen[-1].attained) == (0, 0)


async def test_progress_counts_up(peer: Peer) -> None:
    seen: list[Progress] = []
    await run_load(peer.target, replace(PLAN, warmup=1, duration=0.8), progress=seen.append)
    assert seen[0].at < 0
    assert seen[0].sent == 0
    assert seen[-1].sent >= seen[-1].ended >= seen[-1].attained > 0
    assert seen[-1].duration == 0.8


async def test_connections_are_as_many_as_asked_for(peer: Peer) -> None:
    before = len(peer.calls)
    result = await run_load(peer.target, replace(PLAN, connections=3))
    assert len(peer.calls) - before - len(predictions(peer)) == 3
    assert len({call.peer for call in predictions(peer)}) == 3
    assert len(result.outcomes) == 25


async def test_cancelling_it_cancels_its_calls(peer: Peer) -> None:
    peer.called.clear()
    running = asyncio.create_task(run_load(peer.target, replace(PLAN, duration=60)))
    await asyncio.to_thread(peer.called.wait, 60)
    await asyncio.sleep(0.2)
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running


async def test_a_server_that_is_not_there_is_an_error() -> None:
    with pytest.raises(TomeError, match="UNAVAILABLE: localhost:1 is unavailable"):
        await run_load("localhost:1", PLAN)


def test_its_event_loop_runs_a_load(peer: Peer) -> None:
    with asyncio.Runner(loop_factory=event_loop) as runner:
        assert len(runner.run(run_load(peer.target, PLAN)).outcomes) == 25
