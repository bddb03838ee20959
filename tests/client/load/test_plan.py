from __future__ import annotations

import math
from collections import Counter
from dataclasses import replace

import pytest

from tome_client.load import Arrival, LoadPlan, Renewal, Sample, Trace, parse_budgets

SAMPLES = [Sample(f"{number}.png", b"") for number in range(7)]
PLAN = LoadPlan(SAMPLES, Renewal(40), parse_budgets("mix:50ms=3,200ms=1"), duration=60, warmup=5, seed=3)


def test_the_schedule_is_fixed_by_the_plan() -> None:
    assert PLAN.schedule() == PLAN.schedule()
    assert PLAN.schedule() != replace(PLAN, seed=4).schedule()


def test_times_ascend_and_the_warm_ups_are_negative() -> None:
    times = [one.at for one in PLAN.schedule()]
    assert times == sorted(times)
    assert -5 < times[0] < 0 < times[-1] < 60
    assert sum(at < 0 for at in times) == pytest.approx(5 * 40, rel=0.3)


def test_neither_budgets_nor_warm_up_move_the_arrivals() -> None:
    other = replace(PLAN, budgets=parse_budgets("1s"), warmup=0).schedule()
    assert [one.at for one in other] == [one.at for one in PLAN.schedule() if one.at >= 0]


def test_budgets_are_drawn_by_weight() -> None:
    drawn = Counter(one.budget for one in PLAN.schedule())
    assert drawn.keys() == {0.05, 0.2}
    assert drawn[0.05] / drawn.total() == pytest.approx(0.75, abs=0.05)


def test_images_are_sent_equally_often_in_changing_order() -> None:
    sent = [one.sample for one in PLAN.schedule()]
    rounds = [sent[start : start + 7] for start in range(0, len(sent) - 6, 7)]
    assert all(sorted(one) == list(range(7)) for one in rounds)
    assert len({tuple(one) for one in rounds}) > len(rounds) / 2


def test_a_trace_keeps_its_times_and_budgets_and_warms_up_at_its_rate() -> None:
    trace = Trace((Arrival(0.1, 0.05), Arrival(0.2), Arrival(9.9, 0.2)))
    plan = LoadPlan(SAMPLES, trace, parse_budgets("1s"), duration=trace.duration, warmup=100)
    measured = [one for one in plan.schedule() if one.at >= 0]
    assert [(one.at, one.budget) for one in measured] == [(0.1, 0.05), (0.2, 1.0), (9.9, 0.2)]
    assert 10 < len(plan.schedule()) - 3 < 60


def test_a_trace_with_all_its_budgets_needs_no_others() -> None:
    trace = Trace((Arrival(0.1, 0.05), Arrival(0.2, 0.1)))
    plan = LoadPlan(SAMPLES, trace, duration=1, warmup=10)
    assert {one.budget for one in plan.schedule()} == {0.05, 0.1}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"samples": []}, "no image to send"),
        ({"duration": 0}, "duration of a run must be above 0"),
        ({"duration": float("inf")}, "duration of a run must be above 0"),
        ({"warmup": -1}, "warm-up must not be negative"),
        ({"connections": 0}, "at least one connection"),
        ({"budgets": ()}, "every request needs a budget"),
        ({"budgets": (), "arrivals": Trace((Arrival(0, 1), Arrival(1)))}, "every request needs a budget"),
    ],
)
def test_a_plan_that_cannot_be_run_is_refused(change: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(PLAN, **change)


def test_requests_may_have_no_deadline_by_the_mix_or_the_trace() -> None:
    mixed = replace(PLAN, budgets=parse_budgets("mix:50ms=3,none=1"))
    drawn = Counter(one.budget for one in mixed.schedule())
    assert drawn.keys() == mixed.possible_budgets() == {0.05, math.inf}
    assert drawn[math.inf] / drawn.total() == pytest.approx(0.25, abs=0.05)
    trace = LoadPlan(SAMPLES, Trace((Arrival(0.1, math.inf), Arrival(0.2, 0.1))), duration=1)
    assert [one.budget for one in trace.schedule()] == [math.inf, 0.1]


@pytest.mark.parametrize(
    "change", [{"budgets": parse_budgets("mix:50ms,none")}, {"arrivals": Trace((Arrival(0, math.inf),)), "duration": 1}]
)
def test_what_has_no_deadline_cannot_be_sent_as_one(change: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="requests without a deadline have none"):
        replace(PLAN, deadline_only=True, **change)
