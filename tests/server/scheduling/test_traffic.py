import math
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tome_server.scheduling.policy.view import Traffic
from tome_server.scheduling.traffic import TrafficMeter
from tome_server.simulation.workload import Steady, draw


def test_nothing_is_known_before_the_first_arrival() -> None:
    assert TrafficMeter().at(5.0) == Traffic()


def test_one_arrival_is_no_rush() -> None:
    meter = TrafficMeter()
    meter.add(3.0, 0.1)
    assert 0 < meter.at(3.0).rate < 10
    assert meter.at(3.0).dispersion == 1
    assert meter.at(3.0).budgets == ((0.1, 1.0),)


@pytest.mark.parametrize("rate", [5.0, 200.0])
def test_even_arrivals_are_counted_as_they_come(rate: float) -> None:
    meter = TrafficMeter()
    for number in range(int(rate * 10)):
        meter.add(number / rate, 0.1)
    assert meter.at(10.0).rate == pytest.approx(rate, rel=0.1)
    assert meter.at(10.0).dispersion == 1


@pytest.mark.parametrize(("cv2", "least", "most"), [(1.0, 1.0, 1.6), (4.0, 2.7, 5.5), (8.0, 4.5, 12.0)])
def test_rate_and_dispersion_converge(cv2: float, least: float, most: float) -> None:
    rates, dispersions = [], []
    for seed in range(5):
        meter = TrafficMeter()
        for at, budget in draw(Steady(400.0, 20.0), (0.1,), cv2=cv2, seed=seed):
            meter.add(at, budget)
            if at > 10:
                rates.append(meter.at(at).rate)
                dispersions.append(meter.at(at).dispersion)
    assert sum(rates) / len(rates) == pytest.approx(400, rel=0.1)
    assert least <= sum(dispersions) / len(dispersions) <= most


def test_a_higher_rate_shows_within_seconds() -> None:
    meter = TrafficMeter()
    for number in range(1000):
        meter.add(number / 100, 0.1)
    for number in range(1000):
        meter.add(10 + number / 500, 0.1)
    assert 300 < meter.at(12.0).rate < 500


def test_what_is_long_past_is_forgotten() -> None:
    meter = TrafficMeter()
    for number in range(1000):
        meter.add(number / 100, 0.1)
    assert meter.at(30.0).rate < 1


def test_budgets_are_told_in_classes_of_the_latest() -> None:
    meter, rng = TrafficMeter(), random.Random(0)
    for number in range(100):
        meter.add(number / 100, 9.0)
    for number in range(400):
        meter.add(1 + number / 100, rng.choice((0.1, 0.2, 0.5)))
    budgets = meter.at(5.0).budgets
    assert {budget for budget, _ in budgets} <= {0.1, 0.2, 0.5}
    assert budgets[-1][1] == 1


def test_requests_without_a_deadline_are_no_traffic() -> None:
    alone, beside = TrafficMeter(), TrafficMeter()
    for number in range(100):
        alone.add(number / 100, 0.1)
        beside.add(number / 100, 0.1)
        for _ in range(5):
            beside.add(number / 100, math.inf)
    assert beside.at(1.0) == alone.at(1.0)


def test_the_rate_of_fast_arrivals_is_known_after_some_dozens() -> None:
    meter = TrafficMeter()
    for number in range(100):
        meter.add(number / 5000, 0.01)
    assert 3500 < meter.at(0.02).rate < 5500


@given(st.lists(st.tuples(st.floats(0, 5), st.floats(1e-3, 10)), min_size=1), st.floats(0, 9))
def test_whatever_comes_in_is_told_in_numbers(arrivals: list[tuple[float, float]], later: float) -> None:
    meter, now = TrafficMeter(), 0.0
    for gap, budget in arrivals:
        now += gap
        meter.add(now, budget)
    traffic = meter.at(now + later)
    assert 0 <= traffic.rate < math.inf
    assert 1 <= traffic.dispersion < math.inf
    budgets, shares = zip(*traffic.budgets, strict=True)
    assert list(budgets) == sorted(set(budgets))
    assert list(shares) == sorted(set(shares))
    assert 0 < shares[0] <= shares[-1] == 1
    # Each class's share is that of the latest arrivals which allow no more.
    latest = [budget for _, budget in arrivals[-64:]]
    for budget, share in traffic.budgets:
        assert share <= sum(other <= budget for other in latest) / len(latest) + 1e-9
