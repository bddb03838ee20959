from __future__ import annotations

import math
from dataclasses import replace

import pytest

from tests.client.load.outcomes import PLAN, answered, failed, result
from tome_client.load import (
    Arrival,
    Criterion,
    LoadPlan,
    LoadResult,
    Probe,
    Trace,
    parse_budgets,
    parse_criterion,
    search_rate,
)


def at_rate(plan: LoadPlan, *, capacity: float, lags_above: float = 1e9) -> LoadResult:
    rate = plan.arrivals.rate
    lag = 0.05 if rate > lags_above else 0.0
    return result([answered(lag=lag)] * 95 + [answered(lag=lag, latency=0.05 if rate <= capacity else 1.0)] * 5)


@pytest.mark.parametrize("first", [1, 10, 37, 1000])
@pytest.mark.parametrize("criterion", ["p99", "attainment:0.99"])
async def test_it_ends_between_the_highest_rate_that_does_and_one_that_does_not(first: float, criterion: str) -> None:
    async def run(plan: LoadPlan) -> LoadResult:
        return at_rate(plan, capacity=37)

    told: list[Probe] = []
    plan = replace(PLAN, arrivals=replace(PLAN.arrivals, rate=first))
    found = await search_rate(plan, parse_criterion(criterion), run, resolution=0.02, tell=told.append)
    assert found.rate <= 37 < found.too_high <= found.rate * 1.02
    assert found.limited_by == "server"
    assert found.criterion == criterion
    assert tuple(told) == found.probes
    assert all(probe.passed == (probe.rate <= 37) for probe in found.probes)
    assert found.best is not None


async def test_a_generator_that_lags_does_not_pass_for_a_server_that_keeps_up() -> None:
    async def run(plan: LoadPlan) -> LoadResult:
        return at_rate(plan, capacity=1000, lags_above=200)

    found = await search_rate(PLAN, Criterion("percentile", 0.99), run)
    assert found.rate <= 200 < found.too_high
    assert found.limited_by == "generator"


async def test_a_run_in_which_the_generator_lagged_is_made_again_before_it_counts() -> None:
    rates: list[float] = []

    async def run(plan: LoadPlan) -> LoadResult:
        rates.append(plan.arrivals.rate)
        return at_rate(plan, capacity=15, lags_above=0 if len(rates) == 1 else 1e9)

    found = await search_rate(PLAN, Criterion("percentile", 0.99), run)
    assert rates[:3] == [10, 10, 20]
    assert found.probes[0].passed
    assert found.limited_by == "server"


async def test_where_no_rate_will_do_it_gives_up_at_a_handful_of_requests() -> None:
    async def run(plan: LoadPlan) -> LoadResult:
        return result([failed()] * 10)

    found = await search_rate(PLAN, Criterion("attainment", 0.5), run)
    assert (found.rate, found.best) == (None, None)
    assert found.too_high == pytest.approx(1)


async def test_where_every_rate_will_do_it_ends() -> None:
    async def run(plan: LoadPlan) -> LoadResult:
        return result([answered()])

    found = await search_rate(PLAN, Criterion("attainment", 0.5), run)
    assert found.rate > 1e9
    assert (found.too_high, found.limited_by) == (None, "search")


async def test_a_run_that_was_stopped_ends_it_with_what_was_found() -> None:
    rates: list[float] = []

    async def run(plan: LoadPlan) -> LoadResult:
        rates.append(plan.arrivals.rate)
        return result([answered()] * 100, stopped=len(rates) == 3)

    found = await search_rate(PLAN, Criterion("percentile", 0.99), run)
    assert rates == [10, 20, 40]
    assert (found.rate, found.stopped, len(found.probes)) == (20, True, 2)


def test_a_percentile_holds_in_every_budget_and_a_share_over_all() -> None:
    mixed = result([answered(budget=1.0)] * 990 + [answered(budget=0.02, latency=0.05)] * 10)
    assert Criterion("attainment", 0.99).met(mixed)
    assert not Criterion("percentile", 0.99).met(mixed)


def test_what_is_not_answered_is_later_than_any_budget() -> None:
    assert Criterion("percentile", 0.5).met(result([answered(), failed()]))
    assert not Criterion("percentile", 0.51).met(result([answered(), failed()]))
    assert not Criterion("percentile", 0.5).met(result([]))


@pytest.mark.parametrize(
    ("text", "criterion"),
    [
        ("p99", Criterion("percentile", 0.99)),
        ("p99.9", Criterion("percentile", 0.999)),
        ("attainment:0.9", Criterion("attainment", 0.9)),
    ],
)
def test_criteria_are_percentiles_or_attainment(text: str, criterion: Criterion) -> None:
    assert parse_criterion(text) == Criterion(criterion.kind, pytest.approx(criterion.share))
    assert str(parse_criterion(text)) == text


@pytest.mark.parametrize("text", ["", "p", "p0", "p101", "pmost", "attainment", "attainment:2", "goodput:3", "p99:1"])
def test_other_criteria_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"not a criterion: .*write p99, or attainment"):
        parse_criterion(text)


@pytest.mark.parametrize("criterion", ["p99", "attainment:0.99"])
async def test_requests_without_a_deadline_do_not_count(criterion: str) -> None:
    bulk = [failed(budget=math.inf), answered(budget=math.inf, latency=60)] * 50

    async def run(plan: LoadPlan) -> LoadResult:
        judged = at_rate(plan, capacity=37).outcomes
        return result([*judged, *bulk])

    found = await search_rate(PLAN, parse_criterion(criterion), run)
    assert found.rate <= 37 < found.too_high


async def test_without_any_deadline_there_is_nothing_to_search_for() -> None:
    async def run(plan: LoadPlan) -> LoadResult:
        raise AssertionError

    plan = replace(PLAN, budgets=parse_budgets("none"))
    with pytest.raises(ValueError, match="no request has a deadline"):
        await search_rate(plan, Criterion("percentile", 0.99), run)


async def test_neither_a_trace_nor_a_resolution_of_nothing_can_be_searched() -> None:
    async def run(plan: LoadPlan) -> LoadResult:
        raise AssertionError

    with pytest.raises(ValueError, match="a trace has its own rate"):
        await search_rate(replace(PLAN, arrivals=Trace((Arrival(1),))), Criterion("percentile", 0.99), run)
    with pytest.raises(ValueError, match="share above 0"):
        await search_rate(PLAN, Criterion("percentile", 0.99), run, resolution=0)
