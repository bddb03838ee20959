import math
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.server.scheduling.cases import QUALITY, RS, device, profiles, steps
from tome_server.scheduling.policy.curve import price_curve
from tome_server.scheduling.policy.price import Price
from tome_server.scheduling.policy.view import Traffic, View
from tome_server.scheduling.profile import Latency, Profile
from tome_server.scheduling.queue import Waiting
from tome_server.scheduling.scheduler import Scheduler

# (price from which it is used, speed as a share of the last level's)
STEPS = ((0.0, 0.5), (0.1, 0.7), (0.4, 0.9), (0.8, 1.0))


def curve(load: float, depth: float, steps: tuple[tuple[float, float], ...] = STEPS) -> tuple[float, ...]:
    return price_curve(steps, round(20 * math.log(load)), round(20 * math.log(depth)))


@st.composite
def all_steps(draw: st.DrawFn) -> tuple[tuple[float, float], ...]:
    prices = sorted(draw(st.lists(st.floats(0, 3), max_size=6)))
    speeds = sorted(draw(st.lists(st.floats(0.1, 1), min_size=len(prices) + 1, max_size=len(prices) + 1)))
    return tuple(zip((0.0, *prices), speeds, strict=True))


@given(all_steps(), st.integers(-300, 200), st.integers(-200, 300))
@settings(deadline=None)
def test_the_price_rises_from_nothing_when_idle_to_all_when_out_of_time(
    steps: tuple[tuple[float, float], ...], load: int, depth: int
) -> None:
    prices = price_curve(steps, load, depth)
    assert prices[0] == 0
    assert prices[-1] == 1
    assert all(before <= after + 1e-9 for before, after in pairwise(prices))


@given(st.floats(0.05, 3), st.floats(0.5, 500))
@settings(deadline=None)
def test_the_price_solves_its_equation(load: float, depth: float) -> None:
    # Between two steps of the price, price'' = -2 depth (1 - speed / load) price', so log price' is linear.
    load, depth = math.exp(round(20 * math.log(load)) / 20), math.exp(round(20 * math.log(depth)) / 20)
    prices = curve(load, depth)
    for before, here, after in zip(prices, prices[1:], prices[2:], strict=False):
        index = sum(start <= here for start, _ in STEPS) - 1
        least, most = STEPS[index][0], STEPS[index + 1][0] if index + 1 < len(STEPS) else 1.0
        if least < before and after < most and here - before > 1e-6:
            growth = math.log((after - here) / (here - before)) * (len(prices) - 1)
            assert growth == pytest.approx(-2 * depth * (1 - STEPS[index][1] / load), rel=1e-3, abs=1e-3)


def test_the_busier_the_dearer() -> None:
    loads = [0.01, 0.1, 0.3, 0.6, 0.9, 1.2, 2.0]
    for lower, higher in pairwise(loads):
        assert all(a <= b + 1e-6 for a, b in zip(curve(lower, 20), curve(higher, 20), strict=True))


def test_time_costs_nothing_while_hardly_anybody_comes() -> None:
    assert curve(0.001, 200)[20] < 1e-9
    assert curve(0.2, 50)[20] < 1e-3


def test_time_is_dear_at_once_in_an_overload() -> None:
    assert curve(2.0, 50)[2] > 0.9


def view(traffic: Traffic, waiting: int = 1, slack: float = 0.036) -> View:
    requests = [Waiting(item, 0.0, slack, 0, len(RS) - 1) for item in range(waiting)]
    return View(0.0, requests, Latency(device()), traffic)


def price() -> Price:
    return Price(device(), QUALITY)


@pytest.mark.parametrize("rate", [0.01, 1.0, 100.0, 400.0])
def test_a_lone_request_is_not_merged_while_few_come(rate: float) -> None:
    decision = price()(view(Traffic(rate, 1.0, ((0.036, 1.0),))))
    assert decision.levels == [0]


@pytest.mark.parametrize("quality", [(84.5, 84.5, 84.4, 83, 80), (84.5, 84.4, 84.9, 83, 80), (80, 81, 82, 83, 84)])
def test_an_idle_device_does_not_merge_for_a_quality_that_rises_by_luck(quality: tuple[float, ...]) -> None:
    decision = Price(device(), quality)(view(Traffic(1.0, 1.0, ((0.036, 1.0),))))
    assert decision.levels == [0]


def test_a_lone_request_is_not_merged_though_nothing_is_known_of_traffic() -> None:
    assert price()(view(Traffic())).levels == [0]


def test_more_is_merged_the_more_come() -> None:
    rates = (100, 900, 1300, 1700, 2500)
    levels = [price()(view(Traffic(rate, 1.0, ((0.036, 1.0),)), waiting=10)).levels[0] for rate in rates]
    assert levels == sorted(levels)
    assert levels[0] == 0
    assert levels[-1] == len(RS) - 1


def test_more_is_merged_when_arrivals_are_bursty() -> None:
    calm, bursty = (
        price()(view(Traffic(900.0, dispersion, ((0.036, 1.0),)), waiting=12)).levels[0] for dispersion in (1.0, 16.0)
    )
    assert bursty >= calm


def test_who_can_not_be_met_does_not_hold_up_the_others() -> None:
    # The first is due so soon that it could only run alone; the others fill a batch.
    latency = Latency(device())
    hasty = Waiting(0, 0.0, 1.02 * latency.promised(1, 4), 0, 4)
    others = [Waiting(item, 0.0, 0.017, 0, 4) for item in range(1, 40)]
    decision = price()(View(0.0, [hasty, *others], latency, Traffic(2000.0, 1.0, ((0.017, 1.0),))))
    assert hasty not in decision.batch
    assert len(decision.batch) > 10


@pytest.mark.parametrize("quality", [(), (1.0,) * 4, (1.0, 1.0, 1.0, 1.0, 0.0)])
def test_quality_must_be_known_at_each_level(quality: tuple[float, ...]) -> None:
    with pytest.raises(ValueError, match="5 levels need as many positive qualities"):
        Price(device(), quality)


def test_a_level_that_is_worse_and_no_faster_is_not_used() -> None:
    profile = Profile((1, 4), (0, 4, 8), ((1.0, 1.0, 0.9), (3.0, 3.0, 2.0)), ((1.0, 1.0, 0.9), (3.0, 3.0, 2.0)))
    policy = Price(profile, (0.9, 0.8, 0.7))
    for rate in (0.01, 1.0, 1.5, 2.0, 5.0):
        requests = [Waiting(item, 0.0, 10.0, 0, 2) for item in range(4)]
        decision = policy(View(0.0, requests, Latency(profile), Traffic(rate, 1.0, ((10.0, 1.0),))))
        assert 1 not in decision.levels


def flat(largest: int = 8) -> Profile:
    """A device that takes 6 ms for up to three images at r = 0, and six at the most merging."""
    p50 = tuple(tuple(max(0.006, 0.002 * size * share) for share in (1.0, 0.5)) for size in range(1, largest + 1))
    return Profile(tuple(range(1, largest + 1)), (0, 8), p50, p50)


def test_a_budget_of_three_images_in_an_overload_is_served_in_batches_and_merged() -> None:
    # Where one image costs the same at each r, a batch is what merging pays in.
    requests = [Waiting(item, 0.0, 0.0125 + 0.0005 * item, 0, 1) for item in range(8)]
    decision = Price(flat(), (0.9, 0.89))(View(0.0, requests, Latency(flat()), Traffic(1500.0, 1.0, ((0.018, 1.0),))))
    assert len(decision.batch) > 3
    assert set(decision.levels) == {1}


def test_what_merging_does_not_save_is_not_merged() -> None:
    requests = [Waiting(item, 0.0, 0.018, 0, 1) for item in range(2)]
    decision = Price(flat(), (0.9, 0.89))(View(0.0, requests, Latency(flat()), Traffic(1500.0, 1.0, ((0.018, 1.0),))))
    assert list(decision.levels) == [0, 0]


def test_a_batch_is_no_longer_than_hasty_newcomers_can_wait() -> None:
    # 20 could run together; one in two newcomers allows 7 ms, and is lost if it finds the device busy for four.
    traffic = Traffic(700.0, 1.0, ((0.007, 0.5), (0.2, 1.0)))
    decision = price()(view(traffic, waiting=20, slack=0.2))
    assert Latency(device()).of_batch(decision.levels) < 0.0045


# A little traffic, none, and a device that is overloaded.
RATES = (0.0, 20.0, 3000.0)


def bulk(waiting: int, low: int = 0) -> list[Waiting[int]]:
    return [Waiting(100 + item, 0.0, math.inf, low, len(RS) - 1) for item in range(waiting)]


@pytest.mark.parametrize("rate", RATES)
def test_requests_without_a_deadline_run_unmerged_when_no_other_waits(rate: float) -> None:
    traffic = Traffic(rate, 1.0, ((0.036, 1.0),)) if rate else Traffic()
    decision = price()(View(0.0, bulk(40), Latency(device()), traffic))
    assert decision.batch
    assert set(decision.levels) == {0}
    assert not decision.shed
    if rate:
        assert Latency(device()).of_batch(decision.levels) < 0.036


@pytest.mark.parametrize("rate", RATES)
@pytest.mark.parametrize("waiting", [1, 5, 40])
def test_requests_without_a_deadline_change_nothing_for_those_that_have_one(rate: float, waiting: int) -> None:
    traffic = Traffic(rate, 1.0, ((0.036, 1.0),)) if rate else Traffic()
    alone = view(traffic, waiting=waiting)
    beside = View(alone.now, [*alone.waiting, *bulk(40)], alone.latency, traffic)
    without, with_them = price()(alone), price()(beside)
    assert list(with_them.batch[: len(without.batch)]) == list(without.batch)
    assert with_them.levels[: len(without.levels)] == list(without.levels)
    longer = alone.latency.of_batch(with_them.levels) / alone.latency.of_batch(without.levels)
    assert longer <= 1.01


def test_a_request_without_a_deadline_joins_a_batch_that_it_makes_no_longer() -> None:
    requests = [Waiting(0, 0.0, 0.018, 0, 1), *(Waiting(item, 0.0, math.inf, 0, 1) for item in range(1, 6))]
    decision = Price(flat(), (0.9, 0.89))(View(0.0, requests, Latency(flat()), Traffic(10.0, 1.0, ((0.018, 1.0),))))
    assert len(decision.batch) == 3


@st.composite
def feasible(draw: st.DrawFn) -> tuple[Profile, list[float]]:
    """A profile and deadlines that are all met, with a little left, by merging the most in the largest batches."""
    profile = draw(profiles())
    latency, size = Latency(profile), profile.max_batch
    total, ends, deadlines = draw(st.integers(1, 40)), 0.0, list[float]()
    for start in range(0, total, size):
        members = min(size, total - start)
        ends += latency.promised(members, latency.levels - 1)
        # Predictions move by a percent or so with each batch.
        deadlines += [1.1 * ends * draw(st.one_of(st.just(1.0), st.floats(1, 20))) for _ in range(members)]
    return profile, deadlines


@given(feasible())
@settings(deadline=None)
def test_nobody_who_waits_is_lost_for_the_quality_of_another(case: tuple[Profile, list[float]]) -> None:
    profile, deadlines = case
    scheduler: Scheduler[int] = Scheduler(Latency(profile), Price(profile, QUALITY))
    for number, deadline in enumerate(deadlines):
        scheduler.submit(Waiting(number, 0.0, deadline, 0, len(RS) - 1), 0.0, 0.0)
    now, true = 0.0, Latency(profile)
    while decision := scheduler.next(now):
        assert not decision.shed
        seconds = true.of_batch(decision.levels)
        scheduler.latency.observe(decision.levels, seconds)
        now += seconds
        assert all(now <= request.deadline for request in decision.batch)
    assert len(scheduler) == 0


@pytest.mark.parametrize("rate", RATES)
@pytest.mark.parametrize("slack", [4.0, 0.03], ids=["all can be met", "few can be met"])
@pytest.mark.parametrize(("waiting", "most"), [(100, 2500), (2000, 7000)])
def test_a_decision_takes_few_steps_however_many_wait(waiting: int, most: int, slack: float, rate: float) -> None:
    policy, seen = price(), view(Traffic(rate, 4.0, ((slack / 4, 0.5), (slack, 1.0))), waiting, slack)
    policy(seen)  # the curve of this load is solved once
    assert steps(lambda: policy(seen)) < most


BURSTS = Traffic(200.0, 4.0, ((0.008, 1.0),))


def test_a_free_device_waits_for_the_mates_of_a_burst_where_budgets_are_too_short_for_the_next_batch() -> None:
    assert price().patience(view(BURSTS, slack=0.008)) == pytest.approx(0.02 * 0.008)


@pytest.mark.parametrize(
    ("seen", "why"),
    [
        (view(Traffic(200.0, 1.2, ((0.008, 1.0),)), slack=0.008), "arrivals without bursts"),
        (view(Traffic(200.0, 4.0, ((0.036, 1.0),))), "the next batch answers those that come during this one"),
        (view(BURSTS, waiting=30, slack=0.008), "a batch as efficient as any"),
        (view(Traffic(), slack=0.008), "nothing known of the traffic"),
        (view(BURSTS, slack=math.inf), "no deadline"),
    ],
)
def test_a_free_device_does_not_wait_in_vain(seen: View, why: str) -> None:
    assert price().patience(seen) == 0, why


def test_a_device_whose_batches_save_no_time_never_waits() -> None:
    one_by_one = device(batch=0.0)
    seen = View(
        0.0, [Waiting(0, 0.0, 0.002, 0, len(RS) - 1)], Latency(one_by_one), Traffic(200.0, 4.0, ((0.002, 1.0),))
    )
    assert Price(one_by_one, QUALITY).patience(seen) == 0
