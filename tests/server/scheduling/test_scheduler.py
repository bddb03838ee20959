import logging
import math
from collections.abc import Callable
from itertools import count

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, rule

from tests.server.scheduling.cases import NAMES, QUALITY, RS, Asked, asked, device, named, profiles
from tome_server.errors import InfeasibleError
from tome_server.scheduling.policy.published import max_batch
from tome_server.scheduling.policy.view import Decision, Policy, View
from tome_server.scheduling.profile import Latency, Profile
from tome_server.scheduling.queue import Waiting
from tome_server.scheduling.scheduler import Scheduler

TOP = len(RS) - 1


def scheduler(policy: Policy = max_batch, largest: int = 8) -> Scheduler[str]:
    return Scheduler(Latency(device(largest=largest)), policy)


def request(item: str, deadline: float, low: int = 0, high: int = TOP) -> Waiting[str]:
    return Waiting(item, 0.0, deadline, low, high)


def test_nobody_waits_and_there_is_nothing_to_run() -> None:
    empty = scheduler()
    assert len(empty) == 0
    assert empty.next(0.0) is None
    assert empty.deadline == math.inf


def test_the_earliest_deadlines_run_first() -> None:
    one = scheduler(largest=2)
    for item, deadline in (("d", 9.0), ("n", math.inf), ("a", 1.0), ("c", 5.0)):
        one.submit(request(item, deadline), 0.0, 0.0)
    assert one.deadline == 1.0
    batches = [[member.item for member in decision.batch] for _ in range(2) if (decision := one.next(0.0))]
    assert batches == [["a", "c"], ["d", "n"]]
    assert one.next(0.0) is None


def test_a_request_without_a_deadline_is_never_refused() -> None:
    one = scheduler()
    for number in range(1000):
        one.submit(request(str(number), math.inf), 0.0, 5.0)
    # Nor does it count against one that has one.
    one.submit(request("hasty", 5.02), 0.0, 5.0)
    decision = one.next(5.0)
    assert decision
    assert decision.batch[0].item == "hasty"


def test_a_request_is_admitted_that_small_batches_make_in_time_and_large_ones_do_not() -> None:
    # Each image alone takes 10 ms, eight at once 160.
    p50 = tuple(tuple(0.010 * size**1.33 for _ in RS) for size in range(1, 9))
    one: Scheduler[str] = Scheduler(Latency(Profile(tuple(range(1, 9)), RS, p50, p50)), max_batch)
    for number in range(7):
        one.submit(request(str(number), 0.1), 0.0, 0.0)
    one.submit(request("last", 0.09), 0.0, 0.0)
    with pytest.raises(InfeasibleError):
        one.submit(request("too late", 0.0799), 0.0, 0.075)


def test_a_cancelled_request_never_runs() -> None:
    one = scheduler()
    gone, stays = request("a", 1.0), request("b", 2.0)
    one.submit(gone, 0.0, 0.0)
    one.submit(stays, 0.0, 0.0)
    assert one.cancel(gone)
    assert not one.cancel(gone)
    decision = one.next(0.0)
    assert decision
    assert decision.batch == [stays]
    assert not one.cancel(stays)


def test_who_can_not_be_met_any_more_is_shed_and_not_run() -> None:
    one = scheduler()
    late, fine = request("a", 0.01), request("b", 1.0)
    one.submit(late, 0.0, 0.0)
    one.submit(fine, 0.0, 0.0)
    decision = one.next(0.0095)
    assert decision
    assert decision.shed == (late,)
    assert decision.batch == [fine]


def test_when_all_are_shed_there_is_no_batch() -> None:
    one = scheduler()
    one.submit(request("a", 0.01), 0.0, 0.0)
    decision = one.next(0.5)
    assert decision
    assert (len(decision.batch), len(decision.shed)) == (0, 1)
    assert one.next(0.5) is None


def test_what_can_not_be_met_alone_is_refused_with_what_could_be() -> None:
    one = scheduler()
    with pytest.raises(InfeasibleError) as caught:
        one.submit(request("a", 0.002), 0.0, 0.0)
    assert caught.value.smallest == one.latency.promised(1, TOP)
    assert len(one) == 0


def test_the_running_batch_counts() -> None:
    one = scheduler()
    one.submit(request("a", 0.010), 0.0, 0.006)
    with pytest.raises(InfeasibleError) as caught:
        one.submit(request("b", 0.010), 0.0, 0.009)
    assert caught.value.smallest > 0.009 + one.latency.promised(1, TOP)


def test_those_who_are_due_later_do_not_count() -> None:
    one = scheduler()
    for number in range(100):
        one.submit(request(str(number), 10.0), 0.0, 0.0)
    one.submit(request("hasty", 0.01), 0.0, 0.0)
    with pytest.raises(InfeasibleError):
        one.submit(request("patient", 10.0, high=0), 0.0, 9.99)


def test_a_request_that_may_not_be_merged_takes_longer() -> None:
    with pytest.raises(InfeasibleError):
        scheduler().submit(request("a", 0.0034, high=0), 0.0, 0.0)
    scheduler().submit(request("a", 0.0034), 0.0, 0.0)


@given(profiles(), st.lists(asked(), max_size=40), asked(0, 3), st.floats(0, 3))
def test_admission_promises_what_it_keeps(
    profile: Profile, requests: list[Asked], newcomer: Asked, busy: float
) -> None:
    one: Scheduler[int] = Scheduler(Latency(profile), max_batch)
    now, latency = 7.0, one.latency
    for number, other in enumerate(requests):
        try:
            one.submit(other.at(number, now, latency), now, now + busy)
        except InfeasibleError:
            continue
    before, request = len(one), newcomer.at(-1, now, latency)
    # All with an earlier deadline, merged the most in the largest batches, and then this one with the rest.
    ahead = sum(other.deadline <= request.deadline for other in one._queue)
    batches, rest = divmod(ahead, latency.max_batch)
    ends = now + busy + batches * latency.expected(latency.max_batch, TOP) + latency.promised(rest + 1, request.high)
    if ends <= request.deadline:
        one.submit(request, now, now + busy)
    else:
        with pytest.raises(InfeasibleError) as caught:
            one.submit(request, now, now + busy)
        assert len(one) == before
        smallest = caught.value.smallest
        assert smallest > request.deadline - now
        one.submit(Waiting(-1, now, now + smallest + 1e-9, request.low, request.high), now, now + busy)
    assert len(one) == before + 1


def broken(kind: str) -> Policy:
    """A policy that fails in one way."""

    def decide(view: View) -> Decision:
        first, largest = view.waiting[0], view.latency.max_batch
        stranger = Waiting("x", 0.0, first.deadline, 0, TOP)
        stranger.serial = first.serial
        results: dict[str, Callable[[], Decision]] = {
            "raises": lambda: 1 // 0,  # type: ignore[dict-item,return-value]
            "returns nothing": lambda: None,  # type: ignore[dict-item,return-value]
            "names nobody": lambda: Decision((), ()),
            "names a stranger": lambda: Decision([stranger], [0]),
            "names one twice": lambda: Decision([first, first], [0, 0]),
            "runs and sheds one": lambda: Decision([first], [0], [first]),
            "has too few levels": lambda: Decision([first], []),
            "has a level that isn't": lambda: Decision([first], [TOP + 1]),
            "breaks a bound": lambda: Decision([first], [0]),
            "has too large a batch": lambda: Decision(view.waiting[: largest + 1], [TOP] * (largest + 1)),
            "has a level that is no number": lambda: Decision([first], ["most"]),  # type: ignore[list-item]
        }
        return results[kind]()

    return decide


@pytest.mark.parametrize(
    "kind",
    [
        "raises",
        "returns nothing",
        "names nobody",
        "names a stranger",
        "names one twice",
        "runs and sheds one",
        "has too few levels",
        "has a level that isn't",
        "breaks a bound",
        "has too large a batch",
        "has a level that is no number",
    ],
)
def test_a_policy_that_fails_is_done_without_and_counted(kind: str, caplog: pytest.LogCaptureFixture) -> None:
    one = scheduler(broken(kind), largest=4)
    for number in range(6):
        one.submit(request(str(number), 1.0 + number, low=1), 0.0, 0.0)
    with caplog.at_level(logging.ERROR):
        decision = one.next(0.0)
    assert decision
    assert [member.item for member in decision.batch] == ["0", "1", "2", "3"]
    assert list(decision.levels) == [TOP] * 4
    assert one.policy_failures == 1
    assert "the policy failed" in caplog.text
    assert len(one) == 2


def test_a_policy_that_works_is_not_counted() -> None:
    one = scheduler()
    one.submit(request("a", 1.0), 0.0, 0.0)
    one.next(0.0)
    assert one.policy_failures == 0


class Accounts(RuleBasedStateMachine):
    """Whatever happens, every request ends once: refused, shed, cancelled or run."""

    waiting = Bundle("waiting")

    def __init__(self) -> None:
        super().__init__()
        self.numbers = count()
        self.now = 0.0
        self.pending: dict[int, Waiting[int]] = {}
        self.ended: dict[int, str] = {}
        self.one: Scheduler[int] = Scheduler(Latency(device(largest=8)), named("price")(device(largest=8), QUALITY))

    @rule(name=st.sampled_from(NAMES))
    def change_policy(self, name: str) -> None:
        self.one._policy = named(name)(device(largest=8), QUALITY)

    @rule(target=waiting, budget=st.floats(0, 0.1), bounds=st.tuples(st.integers(0, TOP), st.integers(0, TOP)))
    def submit(self, budget: float, bounds: tuple[int, int]) -> Waiting[int]:
        one = Waiting(next(self.numbers), self.now, self.now + budget, min(bounds), max(bounds))
        self.one.arrived(self.now, budget)
        try:
            self.one.submit(one, self.now, self.now)
            self.pending[one.item] = one
        except InfeasibleError:
            self.end(one, "refused")
        return one

    @rule(chosen=consumes(waiting))
    def cancel(self, chosen: Waiting[int]) -> None:
        if self.one.cancel(chosen):
            del self.pending[chosen.item]
            self.end(chosen, "cancelled")
        else:
            assert chosen.item in self.ended

    @rule(seconds=st.floats(0, 0.05))
    def time_passes(self, seconds: float) -> None:
        self.now += seconds

    @rule(slowness=st.floats(0.5, 3))
    def run(self, slowness: float) -> None:
        decision = self.one.next(self.now)
        if decision is None:
            assert not self.pending
            return
        for one in decision.shed:
            del self.pending[one.item]
            self.end(one, "shed")
        for one, level in zip(decision.batch, decision.levels, strict=True):
            assert one.low <= level <= one.high
            assert self.now < one.deadline
            del self.pending[one.item]
            self.end(one, "run")
        if decision.batch:
            seconds = slowness * self.one.latency.of_batch(decision.levels)
            self.one.latency.observe(decision.levels, seconds)
            self.now += seconds

    def end(self, one: Waiting[int], how: str) -> None:
        assert one.item not in self.ended
        self.ended[one.item] = how

    @invariant()
    def those_who_have_not_ended_wait(self) -> None:
        assert len(self.one) == len(self.pending)
        assert self.one.deadline == min((one.deadline for one in self.pending.values()), default=math.inf)
        assert self.one.policy_failures == 0


Accounts.TestCase.settings = settings(max_examples=100, stateful_step_count=50, deadline=None)
TestAccounts = Accounts.TestCase


class Waits:
    """A policy that lets the first request wait for so many seconds."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds

    def __call__(self, view: View) -> Decision:
        return max_batch(view)

    def patience(self, _: View) -> float:
        return self.seconds


def test_a_policy_without_patience_starts_at_once() -> None:
    one = scheduler()
    one.submit(request("a", 1.0), 0.5, 0.0)
    assert one.start(0.5) == 0.5


def test_a_patient_policy_waits_from_the_first_request_on() -> None:
    one = scheduler(Waits(0.1))
    one.submit(request("a", 1.0), 0.5, 0.0)
    one.submit(request("b", 1.0), 0.55, 0.0)
    assert one.start(0.55) == pytest.approx(0.6)
    assert one.next(0.6)
    one.submit(request("c", 2.0), 0.7, 0.0)
    assert one.start(0.7) == pytest.approx(0.8)


def test_waiting_ends_while_one_mate_more_would_still_be_in_time() -> None:
    one = scheduler(Waits(10.0))
    one.submit(request("a", 1.0), 0.0, 0.0)
    assert one.start(0.0) == pytest.approx(1.0 - one.latency.promised(2, TOP))


def test_a_full_batch_waits_for_nothing() -> None:
    one = scheduler(Waits(10.0), largest=2)
    for name in "ab":
        one.submit(request(name, 1.0), 0.0, 0.0)
    assert one.start(0.0) == 0.0


def test_a_policy_that_fails_to_say_how_long_to_wait_starts_at_once_and_is_counted() -> None:
    class Fails(Waits):
        def patience(self, _: View) -> float:
            raise ZeroDivisionError

    one = scheduler(Fails(1.0))
    one.submit(request("a", 1.0), 0.0, 0.0)
    assert one.start(0.25) == 0.25
    assert one.policy_failures == 1
