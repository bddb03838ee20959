"""Several models on one device: each scheduler reckons with what is due for the others."""

import math
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.server.scheduling.cases import NAMES, QUALITY, RS, Asked, asked, device, named, profiles
from tome_server.errors import InfeasibleError
from tome_server.scheduling.policy.view import Decision, Traffic, View, uniform
from tome_server.scheduling.profile import Latency, Profile
from tome_server.scheduling.queue import Waiting
from tome_server.scheduling.scheduler import Scheduler, share_device
from tome_server.scheduling.traffic import together

TOP = len(RS) - 1


def schedulers(*of: Profile, policy: str = "max_batch") -> list[Scheduler[int]]:
    """Those of models that share a device."""
    made = [Scheduler[int](Latency(profile), named(policy)(profile, QUALITY)) for profile in of]
    share_device(made)
    return made


def request(item: int, deadline: float, low: int = 0, high: int = TOP) -> Waiting[int]:
    return Waiting(item, 0.0, deadline, low, high)


def work(latency: Latency, count: int) -> float:
    batches, rest = divmod(count, latency.max_batch)
    seconds = batches * latency.expected(latency.max_batch, TOP)
    return seconds + (latency.expected(rest, TOP) if rest else 0.0)


@given(
    st.lists(profiles(), min_size=2, max_size=3),
    st.lists(st.tuples(st.integers(0, 2), asked()), max_size=40),
    asked(0, 3),
    st.floats(0, 3),
)
def test_admission_counts_what_is_due_before_for_all(
    of: list[Profile], requests: list[tuple[int, Asked]], newcomer: Asked, busy: float
) -> None:
    made, now = schedulers(*of), 7.0
    for number, (place, other) in enumerate(requests):
        one = made[place % len(made)]
        one._queue.push(other.at(number, now, one.latency))
    one = made[0]
    asks = newcomer.at(-1, now, one.latency)
    ahead = [sum(other.deadline <= asks.deadline for other in each._queue) for each in made]
    others = sum(work(each.latency, count) for each, count in zip(made[1:], ahead[1:], strict=True))
    batches, rest = divmod(ahead[0], one.latency.max_batch)
    own = batches * one.latency.expected(one.latency.max_batch, TOP) + one.latency.promised(rest + 1, asks.high)
    ends = now + busy + others + own
    if ends <= asks.deadline - 1e-9:
        one.check(asks, now, now + busy)
    elif ends > asks.deadline + 1e-9:
        with pytest.raises(InfeasibleError) as caught:
            one.check(asks, now, now + busy)
        smallest = caught.value.smallest
        assert smallest > asks.deadline - now - 1e-9
        one.check(Waiting(-1, now, now + smallest + 1e-9, asks.low, asks.high), now, now + busy)


@given(
    st.lists(profiles(), min_size=2, max_size=2),
    st.lists(st.tuples(st.integers(0, 1), st.floats(1, 60)), min_size=1, max_size=30),
    st.sampled_from(["max_accuracy", "max_batch", "slackfit", "fixed:16"]),
)
def test_a_batch_ends_before_the_other_models_requests_must_begin(
    of: list[Profile], requests: list[tuple[int, float]], policy: str
) -> None:
    made, now = schedulers(*of, policy=policy), 7.0
    for number, (place, slack) in enumerate(requests):
        one = made[place]
        one._queue.push(Asked(slack, 0, TOP).at(number, now, one.latency))
    urgent = min(made, key=lambda one: one.deadline)
    [other] = (one for one in made if one is not urgent)
    least = now + urgent.latency.promised(1, TOP)
    # The latest moment for each batch of the other's requests, of those that one image before doesn't make late.
    latest, before = math.inf, 0.0
    for deadline, expected, promised in other._chunks():
        if deadline - before - promised >= least:
            latest = min(latest, deadline - before - promised)
            before += expected
    theirs = list(other._queue)
    decision = urgent.next(now)
    assert decision is not None
    assert urgent.policy_failures == 0
    if decision.batch:
        assert now + urgent.latency.of_batch(decision.levels, promised=True) <= latest + 1e-9
    assert list(other._queue) == theirs


@given(
    st.lists(profiles(), min_size=2, max_size=3),
    st.lists(st.tuples(st.integers(0, 2), st.floats(0, 60)), min_size=1, max_size=30),
)
def test_what_is_admitted_of_several_models_at_once_is_in_time(
    of: list[Profile], requests: list[tuple[int, float]]
) -> None:
    """Images one by one, in order of deadlines: there admission is exact, and no later one comes before."""
    alone = [Profile((1,), RS, one.p50[:1], one.p50[:1]) for one in of]
    made, now = schedulers(*alone, policy="fixed:16"), 7.0
    coming = sorted(
        (slack * made[place % len(made)].latency.promised(1, TOP), number, place % len(made))
        for number, (place, slack) in enumerate(requests)
    )
    admitted = set()
    for slack, number, place in coming:
        try:
            made[place].submit(Waiting(number, now, now + slack, 0, TOP), now, now)
            admitted.add(number)
        except InfeasibleError:
            continue
    while any(map(len, made)):
        urgent = min((one for one in made if len(one)), key=lambda one: one.deadline)
        decision = urgent.next(now)
        assert decision is not None
        now += urgent.latency.of_batch(decision.levels) if decision.batch else 0.0
        for one in decision.batch:
            assert now <= one.deadline + 1e-9
            admitted.remove(one.item)
        # Where rounding decides, one who was to end at its very deadline is given up.
        for one in decision.shed:
            assert now + urgent.latency.promised(1, TOP) > one.deadline - 1e-9
            admitted.remove(one.item)
    assert not admitted


@given(st.lists(asked(), min_size=1, max_size=30), profiles(), st.sampled_from(NAMES))
def test_a_model_beside_others_that_have_no_requests_decides_as_if_alone(
    requests: list[Asked], profile: Profile, policy: str
) -> None:
    alone = Scheduler[int](Latency(profile), named(policy)(profile, QUALITY))
    beside = schedulers(profile, device(), policy=policy)[0]
    decisions: list[Decision | None] = []
    for one in (alone, beside):
        for number, other in enumerate(requests):
            asks = other.at(number, 7.0, one.latency)
            one.arrived(7.0, asks.deadline - 7.0)
            try:
                one.submit(asks, 7.0, 7.0)
            except InfeasibleError:
                continue
        decisions.append(one.next(7.0))
    first, second = decisions
    assert first
    assert second
    assert [member.item for member in first.batch] == [member.item for member in second.batch]
    assert list(first.levels) == list(second.levels)
    assert [member.item for member in first.shed] == [member.item for member in second.shed]


def test_requests_are_due_before_their_deadlines_by_the_others_time() -> None:
    views: list[View] = []

    def policy(view: View) -> Decision:
        views.append(view)
        return uniform(view.waiting[:1], TOP)

    first, second = schedulers(device(), device())
    first._policy = policy
    latency = first.latency
    mine = [request(number, due) for number, due in enumerate((0.1, 0.2, 0.3))]
    for one in mine:
        first.submit(one, 0.0, 0.0)
    second.submit(request(9, 0.202), 0.0, 0.0)
    decision = first.next(0.0)
    assert decision
    assert decision.batch == [mine[0]]
    # What is due later must leave it time; what is due after it comes after it.
    latest = 0.202 - latency.promised(1, TOP)
    assert latest < 0.2
    assert [one.due for one in views[0].waiting] == pytest.approx([0.1, latest, 0.3 - latency.expected(1, TOP)])
    assert [one.deadline for one in mine] == [0.1, 0.2, 0.3]
    # Once the other model has no more requests, or has left the device, deadlines hold again.
    share_device([second])
    share_device([first])
    first.next(0.0)
    assert [one.due for one in views[1].waiting] == [0.2, 0.3]


def test_a_policy_that_names_a_stranger_beside_others_is_done_without() -> None:
    first, second = schedulers(device(), device())
    first._policy = lambda _: Decision([request(5, 1.0)], [0])
    mine = request(0, 0.1)
    first.submit(mine, 0.0, 0.0)
    second.submit(request(1, 0.2), 0.0, 0.0)
    decision = first.next(0.0)
    assert decision
    assert decision.batch == [mine]
    assert first.policy_failures == 1


def test_the_traffic_of_all_is_counted_in_ones_own_images() -> None:
    own = Traffic(100.0, 2.0, ((0.1, 0.5), (0.2, 1.0)))
    other = Traffic(10.0, 4.0, ((0.05, 1.0),))
    both = together(own, [(other, 5.0)])
    assert both.rate == 150
    assert both.dispersion == pytest.approx((100 * 2 + 10 * 25 * 4) / 150)
    assert both.budgets == own.budgets
    assert together(own, [(Traffic(), 5.0)]) == own
    assert together(own, [(replace(other, rate=0.0), 5.0)]) == own
