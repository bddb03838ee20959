from __future__ import annotations

import random
from itertools import pairwise
from pathlib import Path

import pytest

from tome_client.load import Arrival, Renewal, Trace, parse_arrivals, read_trace


def gaps(arrivals: Renewal, duration: float, seed: int = 0) -> list[float]:
    times = [0.0, *(one.at for one in arrivals.draw(duration, random.Random(seed)))]
    return [later - earlier for earlier, later in pairwise(times)]


@pytest.mark.parametrize("cv2", [0.25, 1, 4])
def test_gaps_have_the_rate_and_the_variation_asked_for(cv2: float) -> None:
    drawn = gaps(Renewal(rate=50, cv2=cv2), 4_000)
    mean = sum(drawn) / len(drawn)
    variance = sum((gap - mean) ** 2 for gap in drawn) / len(drawn)
    assert mean == pytest.approx(1 / 50, rel=0.03)
    assert variance / mean**2 == pytest.approx(cv2, rel=0.06)


def test_poisson_gaps_are_exponential() -> None:
    drawn = gaps(Renewal(rate=10), 10_000)
    for share in (0.5, 1, 2):
        longer = sum(gap > share / 10 for gap in drawn) / len(drawn)
        assert longer == pytest.approx(2.718281828**-share, abs=0.01)


@pytest.mark.parametrize(("rate", "duration"), [(40, 30), (3, 1), (1000, 0.7), (0.1, 30)])
def test_constant_arrivals_are_as_many_as_fit_at_equal_gaps(rate: float, duration: float) -> None:
    times = [one.at for one in Renewal(rate, cv2=0).draw(duration, random.Random())]
    assert len(times) == round(rate * duration)
    assert all(later - earlier == pytest.approx(1 / rate) for earlier, later in pairwise(times))
    assert 0 < times[0] <= times[-1] < duration


def test_the_same_seed_draws_the_same_times_and_another_rate_scales_them() -> None:
    slow = [one.at for one in Renewal(10).draw(20, random.Random(7))]
    fast = [one.at for one in Renewal(20).draw(10, random.Random(7))]
    assert slow == [one.at for one in Renewal(10).draw(20, random.Random(7))]
    assert slow == pytest.approx([2 * at for at in fast])
    assert slow != [one.at for one in Renewal(10).draw(20, random.Random(8))]


@pytest.mark.parametrize(
    ("text", "arrivals"),
    [
        ("poisson", Renewal(40, 1)),
        ("constant", Renewal(40, 0)),
        ("gamma:4", Renewal(40, 4)),
        ("gamma:.5", Renewal(40, 0.5)),
    ],
)
def test_arrivals_are_written_by_name(text: str, arrivals: Renewal) -> None:
    assert parse_arrivals(text, 40) == arrivals


@pytest.mark.parametrize(
    ("text", "rate", "message"),
    [
        ("uniform", 40, "not arrivals: 'uniform'; write poisson"),
        ("poisson:4", 40, "not arrivals"),
        ("gamma:much", 40, "not arrivals: 'gamma:much'"),
        ("gamma:-1", 40, "at least 0; got -1"),
        ("gamma:nan", 40, "at least 0; got nan"),
        ("poisson", 0, "above 0; got 0"),
        ("poisson", None, "poisson arrivals need a rate: --rate"),
        ("trace:file", 40, "a trace has its own rate: leave --rate out"),
        ("trace:", None, "not arrivals"),
    ],
)
def test_wrong_arrivals_are_refused_with_what_is_wrong(text: str, rate: float | None, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_arrivals(text, rate)


def test_a_trace_is_read_line_by_line(tmp_path: Path) -> None:
    file = tmp_path / "trace"
    file.write_text("# recorded on a Tuesday\n0.0132 50ms\n\n0.5   # no budget of its own\n0.5 0.2s\n")
    trace = parse_arrivals(f"trace:{file}", None)
    assert trace == Trace((Arrival(0.0132, 0.05), Arrival(0.5), Arrival(0.5, 0.2)))
    assert trace.rate == pytest.approx(6)
    assert len(list(trace.draw(trace.duration, random.Random()))) == 3
    assert len(list(trace.draw(0.5, random.Random()))) == 1


def test_a_wrong_trace_is_refused_by_its_line(tmp_path: Path) -> None:
    file = tmp_path / "trace"
    file.write_text("0.1\n0.2 500\n")
    with pytest.raises(ValueError, match="trace:2: 500 needs a unit: 500ms or 500s"):
        read_trace(file)
