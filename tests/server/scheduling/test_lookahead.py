import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.server.scheduling.cases import QUALITY, RS, device
from tome_server.scheduling.policy.lookahead import Lookahead
from tome_server.scheduling.policy.view import Traffic, View
from tome_server.scheduling.profile import Latency
from tome_server.scheduling.queue import Waiting

LATENCY = Latency(device(largest=8))
TOP = len(RS) - 1


def ahead(
    slacks: list[float],
    rate: float = 0.0,
    budget: float = 0.02,
    price: float = 0.0,
    typical: int = 8,
    later: float = math.inf,
) -> Lookahead:
    """Newcomers, if any, allow `budget`; where `later` is given, half of them that."""
    waiting = [Waiting(item, 0.0, slack, 0, TOP) for item, slack in enumerate(slacks)]
    budgets = ((budget, 0.5), (later, 1.0)) if later < math.inf else ((budget, 1.0),)
    traffic = Traffic(rate, 1.0, budgets if rate else ())
    return Lookahead(View(0.0, waiting, LATENCY, traffic), waiting, QUALITY, price, typical, LATENCY.by_size(TOP))


def test_a_batch_that_leaves_nothing_is_worth_nothing_more() -> None:
    assert ahead([0.02]).after(0.003, 0, 1) == 0


def test_requests_that_are_left_in_time_keep_their_worth() -> None:
    assert ahead([0.02, 0.03, 0.03]).after(0.003, 0, 1) == pytest.approx(2 * QUALITY[0])


def test_a_request_that_is_too_late_after_the_batch_has_none() -> None:
    alone = LATENCY.promised(1, TOP)
    assert ahead([0.02, 0.99 * alone + 0.003]).after(0.003, 0, 1) == 0
    assert ahead([0.02, 1.01 * alone + 0.003]).after(0.003, 0, 1) == pytest.approx(QUALITY[0])


def test_requests_passed_over_count_among_those_left() -> None:
    slacks = [0.015, 0.02, 0.02]
    assert ahead(slacks).after(0.003, 1, 2) == pytest.approx(QUALITY[0])


def test_newcomers_that_the_batch_keeps_waiting_too_long_are_a_loss() -> None:
    alone, rate = LATENCY.promised(1, TOP), 20.0
    in_time, late = 0.02 - alone, 0.02 - alone + 0.01
    assert ahead([1.0], rate).after(in_time, 0, 1) == pytest.approx(0, abs=1e-6)
    assert ahead([1.0], rate).after(late, 0, 1) == pytest.approx(-QUALITY[0] * rate * 0.01, rel=1e-6)


def test_time_costs_the_next_batch_its_price() -> None:
    price = 1000.0
    left = ahead([0.03, 0.03], price=price).after(0.003, 0, 1)
    best = max(QUALITY[level] - price * LATENCY.expected(1, level) for level in (0, TOP))
    assert left == pytest.approx(best)


@given(
    st.lists(st.floats(0.004, 0.2), min_size=1, max_size=20),
    st.floats(0, 3000),
    st.floats(0.004, 0.2),
    st.floats(0, 4e4),
    st.floats(0, 0.1),
    st.floats(0, 0.1),
)
def test_a_longer_batch_never_leaves_more(
    slacks: list[float], rate: float, budget: float, price: float, one: float, other: float
) -> None:
    # But for what larger next batches save: at no price, nothing.
    look = ahead(sorted(slacks), rate, budget)
    assert look.after(max(one, other), 0, 1) <= look.after(min(one, other), 0, 1) + 1e-6
    assert math.isfinite(ahead(sorted(slacks), rate, budget, price).after(one, 0, 1))


@given(
    st.lists(st.floats(0.004, 0.2), min_size=1, max_size=40),
    st.floats(0, 3000),
    st.floats(0.004, 0.05),
    st.floats(0, 1e5),
    st.integers(1, 8),
    st.floats(0.05, 0.2),
    st.floats(0, 0.1),
    st.data(),
)
def test_no_batch_leaves_more_than_the_bound(
    slacks: list[float],
    rate: float,
    budget: float,
    price: float,
    typical: int,
    later: float,
    seconds: float,
    data: st.DataObject,
) -> None:
    look = ahead(sorted(slacks), rate, budget, price, typical, later)
    size = data.draw(st.integers(1, len(look.slacks)))
    first = data.draw(st.integers(0, len(look.slacks) - size))
    assert look.after(seconds, first, size) <= look.at_most(size) + 1e-6


def test_the_bound_is_reached_where_all_can_be_met() -> None:
    look = ahead([1.0] * 20, price=1000.0)
    assert look.after(0.003, 0, 4) == pytest.approx(look.at_most(4))
