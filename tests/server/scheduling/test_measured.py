"""Which profiles are to be measured again, and which of two is kept."""

from dataclasses import replace
from itertools import combinations

import pytest

from tome_server.scheduling.measured import LEAST_ROUNDS, MOST_LOAD, Measured

GOOD = Measured(rounds=5, load=0.01, spread=1.05)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({}, ""),
        ({"load": None}, ""),
        ({"load": MOST_LOAD}, ""),
        ({"rounds": LEAST_ROUNDS}, ""),
        ({"load": 0.374}, "measured while the machine was busy (37% of the time waiting for a CPU)"),
        ({"rounds": 1}, "measured in 1 of at least 3 rounds"),
        ({"rounds": 1, "extrapolated": True}, "measured for too short a time to run batches of several images"),
        (
            {"rounds": 2, "load": 0.5},
            "measured while the machine was busy (50% of the time waiting for a CPU) and in 2 of at least 3 rounds",
        ),
    ],
    ids=str,
)
def test_what_makes_a_profile_provisional_is_said(changes: dict[str, object], said: str) -> None:
    measured = replace(GOOD, **changes)
    assert measured.provisional == bool(said)
    assert str(measured) == said


def test_less_load_is_better_then_more_rounds() -> None:
    best_first = [
        GOOD,
        replace(GOOD, load=0.001, rounds=4),
        replace(GOOD, rounds=2, load=0.05),
        replace(GOOD, rounds=1, load=0.05),
        replace(GOOD, rounds=15, load=0.05, extrapolated=True),
        replace(GOOD, rounds=15, load=0.5),
        replace(GOOD, rounds=3, load=0.6),
        replace(GOOD, rounds=1, load=0.99),
    ]
    for better, worse in combinations(best_first, 2):
        assert better.better_than(worse)
        assert not worse.better_than(better)
    assert not GOOD.better_than(replace(GOOD, load=MOST_LOAD))


@pytest.mark.parametrize(
    "changes", [{"rounds": -1}, {"load": 1.1}, {"load": -0.1}, {"load": float("nan")}, {"spread": 0.0}], ids=str
)
def test_what_no_measurement_gives_is_refused(changes: dict[str, object]) -> None:
    [name] = changes
    with pytest.raises(ValueError, match=name):
        replace(GOOD, **changes)
