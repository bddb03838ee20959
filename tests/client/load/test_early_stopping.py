"""Against what MLPerf's LoadGen 6.0.17 says of Server runs with so many late queries, and against exact sums."""

import math

import pytest

from tome_client.load.early_stopping import enough, least_sent


@pytest.mark.parametrize(("late", "sent"), [(0, 459), (1, 662), (2, 838), (5, 1307), (10, 2010)])
def test_at_the_99th_percentile_it_takes_as_many_as_loadgen_asks_for(late: int, sent: int) -> None:
    assert least_sent(late) == sent
    assert enough(sent, late)
    assert not enough(sent - 1, late)


def test_at_the_90th_percentile_it_takes_the_64_of_mlperfs_single_stream() -> None:
    assert least_sent(1, percentile=0.9) == 64


def exactly(sent: int, late: int, probability: float) -> float:
    return sum(math.comb(sent, k) * probability**k * (1 - probability) ** (sent - k) for k in range(late + 1))


@pytest.mark.parametrize("late", [0, 3, 17, 60])
@pytest.mark.parametrize(
    ("percentile", "confidence", "tolerance"), [(0.9, 0.99, 0), (0.95, 0.9, 0), (0.97, 0.99, 0.005)]
)
def test_it_is_the_binomial_distributions(late: int, percentile: float, confidence: float, tolerance: float) -> None:
    least = least_sent(late, percentile=percentile, confidence=confidence, tolerance=tolerance)
    assert exactly(least, late, 1 - percentile + tolerance) <= 1 - confidence
    assert exactly(least - 1, late, 1 - percentile + tolerance) > 1 - confidence


def test_many_late_ones_need_close_to_a_hundred_times_as_many() -> None:
    assert 100 * 100_000 < least_sent(100_000) < 101 * 100_000


def test_too_many_late_ones_are_never_enough() -> None:
    assert not enough(100_000, 1_000)
    assert not enough(100, 100)
    assert not enough(0, 0)
