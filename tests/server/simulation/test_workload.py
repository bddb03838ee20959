import statistics
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tome_server.simulation.workload import Arrival, Ramp, Rate, Spike, Steady, draw, read_trace


def count(arrivals: list[Arrival], start: float, end: float) -> int:
    return sum(start <= arrival.at < end for arrival in arrivals)


def test_equal_gaps() -> None:
    arrivals = draw(Steady(10, 1), (0.5,), cv2=0)
    assert [arrival.at for arrival in arrivals] == pytest.approx([0.05 + 0.1 * number for number in range(10)])
    assert {arrival.budget for arrival in arrivals} == {0.5}


@pytest.mark.parametrize("cv2", [1.0, 4.0, 8.0])
def test_gaps_have_the_mean_and_the_variation_asked_for(cv2: float) -> None:
    arrivals = draw(Steady(100, 400), (1.0,), cv2=cv2, seed=1)
    gaps = [after.at - before.at for before, after in pairwise(arrivals)]
    mean = statistics.fmean(gaps)
    assert mean == pytest.approx(0.01, rel=0.05)
    assert statistics.variance(gaps) / mean**2 == pytest.approx(cv2, rel=0.1)


def test_a_seed_gives_the_same_again_and_another_does_not() -> None:
    rate = Steady(50, 2)
    assert draw(rate, (0.1, 0.2), seed=3) == draw(rate, (0.1, 0.2), seed=3)
    assert draw(rate, (0.1, 0.2), seed=3) != draw(rate, (0.1, 0.2), seed=4)


@pytest.mark.parametrize(("first", "last"), [(10, 30), (30, 10), (20, 20), (20, 20.0001)])
def test_a_ramp_grows_or_falls_evenly(first: float, last: float) -> None:
    arrivals = draw(Ramp(first, last, 100), (1.0,), cv2=0)
    assert len(arrivals) == pytest.approx(2000, abs=1)
    for start in range(0, 100, 20):
        middle = first + (last - first) * (start + 10) / 100
        assert count(arrivals, start, start + 20) == pytest.approx(20 * middle, abs=2)


def test_a_ramp_down_to_all_but_nothing_ends() -> None:
    assert len(draw(Ramp(10, 0.001, 10), (1.0,), cv2=4, seed=1)) < 200


def test_a_spike_is_a_burst_between_two_calms() -> None:
    arrivals = draw(Spike(10, times=5, start=30, seconds=10, duration=100), (1.0,), cv2=0)
    assert count(arrivals, 0, 30) == pytest.approx(300, abs=1)
    assert count(arrivals, 30, 40) == pytest.approx(500, abs=1)
    assert count(arrivals, 40, 100) == pytest.approx(600, abs=1)


@given(
    st.one_of(
        st.builds(Steady, st.floats(0.1, 100), st.floats(0.1, 100)),
        st.builds(Ramp, st.floats(0.1, 100), st.floats(0.1, 100), st.floats(0.1, 100)),
        st.builds(
            lambda rate, times, parts: Spike(rate, times, parts[0], parts[1], sum(parts) + 0.1),
            st.floats(0.1, 100),
            st.floats(0.1, 20),
            st.tuples(st.floats(0, 30), st.floats(0, 30), st.floats(0, 30)),
        ),
    ),
    st.lists(st.floats(0, 1000), min_size=2),
)
def test_time_never_runs_back(rate: Rate, arrivals: list[float]) -> None:
    times = [rate.when(passed) for passed in sorted(arrivals)]
    assert all(0 <= before <= after + 1e-9 for before, after in pairwise(times))


@pytest.mark.parametrize(
    "wrong",
    [
        lambda: Steady(0, 1),
        lambda: Steady(1, 0),
        lambda: Steady(float("inf"), 1),
        lambda: Ramp(1, -1, 1),
        lambda: Spike(1, 0, 0, 1, 2),
        lambda: Spike(1, 2, 1.5, 1, 2),
        lambda: Spike(1, 2, -1, 1, 2),
        lambda: draw(Steady(1, 1), ()),
        lambda: draw(Steady(1, 1), (0.0,)),
        lambda: draw(Steady(1, 1), (1.0,), cv2=-1),
    ],
)
def test_what_can_not_be_is_refused(wrong: "type[object]") -> None:
    with pytest.raises(ValueError):
        wrong()


def test_budgets_are_drawn_by_weight_or_equally_often() -> None:
    def shares(weights: tuple[float, ...]) -> float:
        arrivals = draw(Steady(100, 100), (0.1, 0.2), weights=weights, seed=1)
        return sum(arrival.budget == 0.1 for arrival in arrivals) / len(arrivals)

    assert shares(()) == shares((2, 2)) == pytest.approx(0.5, abs=0.02)
    assert shares((3, 1)) == pytest.approx(0.75, abs=0.02)


def test_a_trace_is_read_with_its_budgets_or_the_one_given(tmp_path: Path) -> None:
    file = tmp_path / "trace"
    file.write_text("# recorded\n0.0132 50ms\n\n0.5   0.2s # slow one\n0.5\n2 \n")
    assert read_trace(file, 0.1) == [(0.0132, 0.05), (0.5, 0.2), (0.5, 0.1), (2.0, 0.1)]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("0.1 50ms\nsoon 50ms\n", ":2: 'soon' is not a number of seconds"),
        ("1 50ms\n2", "the request at 2 s has no budget, and no other was given"),
        ("1 none", "the request at 1 s has no deadline, and a simulation needs one"),
    ],
)
def test_a_trace_that_cannot_be_simulated_is_refused(text: str, says: str, tmp_path: Path) -> None:
    file = tmp_path / "trace"
    file.write_text(text)
    with pytest.raises(ValueError) as caught:
        read_trace(file)
    assert says in str(caught.value)
