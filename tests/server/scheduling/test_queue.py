import math
from collections.abc import Hashable
from dataclasses import dataclass
from itertools import count

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, precondition, rule

from tome_server.scheduling.queue import DeadlineQueue, Limits, Ticket


def queue(max_batch: int = 8, max_delay: float = 0.0) -> DeadlineQueue[str]:
    return DeadlineQueue(Limits(max_batch, max_delay))


def push(waiting: DeadlineQueue[str], items: str, group: Hashable = "a", deadline: float = math.inf) -> None:
    for item in items:
        waiting.push(item, group=group, arrival=0, deadline=deadline)


def test_an_empty_queue_has_nothing_to_run() -> None:
    waiting = queue()
    assert len(waiting) == 0
    assert waiting.ready_at() is None
    assert waiting.take(0) == []


def test_the_earliest_deadline_goes_first() -> None:
    waiting = queue(max_batch=2)
    for item, deadline in (("late", 9), ("none", math.inf), ("soon", 1), ("later", 5)):
        waiting.push(item, group="a", arrival=0, deadline=deadline)
    assert waiting.take(0) == ["soon", "later"]
    assert waiting.take(0) == ["late", "none"]


def test_requests_that_tie_go_in_order_of_arrival() -> None:
    waiting = queue(max_batch=3)
    push(waiting, "abcdef")
    assert waiting.take(0) == ["a", "b", "c"]
    assert waiting.take(0) == ["d", "e", "f"]


def test_groups_that_tie_go_in_order_of_arrival() -> None:
    waiting = queue()
    for item in "xayb":
        waiting.push(item, group=item in "ab", arrival=0, deadline=5)
    assert waiting.take(0) == ["x", "y"]
    assert waiting.take(0) == ["a", "b"]


def test_a_batch_holds_one_group_that_of_the_earliest_deadline() -> None:
    waiting = queue()
    push(waiting, "abc", "early and late", 9)
    push(waiting, "xyz", "middle", 5)
    push(waiting, "d", "early and late", 1)
    assert waiting.take(0) == ["d", "a", "b", "c"]
    assert waiting.take(0) == ["x", "y", "z"]
    assert len(waiting) == 0


def test_a_batch_is_no_larger_than_the_limit() -> None:
    waiting = queue(max_batch=4)
    push(waiting, "abcdefghi")
    assert [len(waiting.take(0)) for _ in range(4)] == [4, 4, 1, 0]


def test_a_cancelled_request_leaves_the_queue_once() -> None:
    waiting = queue()
    push(waiting, "a")
    ticket = waiting.push("b", group="a", arrival=0, deadline=1)
    assert waiting.cancel(ticket)
    assert not waiting.cancel(ticket)
    assert len(waiting) == 1
    assert waiting.take(0) == ["a"]


def test_a_request_that_was_taken_can_not_be_cancelled() -> None:
    waiting = queue()
    ticket = waiting.push("a", group="a", arrival=0)
    assert waiting.take(0) == ["a"]
    push(waiting, "b")
    assert not waiting.cancel(ticket)
    assert len(waiting) == 1


def test_expired_requests_are_dropped_whatever_their_group() -> None:
    waiting = queue()
    push(waiting, "abc", 1, 5)
    push(waiting, "def", 2, 6)
    push(waiting, "g", 2, 7)
    push(waiting, "h", 1, 8)
    assert waiting.take(6) == ["g"]
    assert waiting.take(6) == ["h"]
    push(waiting, "i", 3, 9)
    assert waiting.take(9) == []
    assert len(waiting) == 0
    assert waiting.ready_at() is None


def test_a_batch_waits_for_mates_from_its_oldest_arrival_on() -> None:
    waiting = queue(max_batch=3, max_delay=2)
    waiting.push("old", group="a", arrival=10, deadline=100)
    waiting.push("young", group="a", arrival=11, deadline=50)
    assert waiting.ready_at() == 12


def test_a_cancelled_request_no_longer_says_when_to_start() -> None:
    waiting = queue(max_delay=2)
    ticket = waiting.push("old", group="a", arrival=10)
    waiting.push("young", group="a", arrival=11)
    waiting.cancel(ticket)
    assert waiting.ready_at() == 13


def test_a_full_batch_starts_at_once() -> None:
    waiting = queue(max_batch=3, max_delay=2)
    push(waiting, "abc")
    assert waiting.ready_at() == -math.inf


def test_a_full_batch_does_not_stand_behind_one_that_waits_for_mates() -> None:
    waiting = queue(max_batch=3, max_delay=2)
    push(waiting, "x", "urgent", 100)
    push(waiting, "abc", "full", 200)
    assert waiting.ready_at() == -math.inf
    assert waiting.take(0) == ["x"]
    assert waiting.take(0) == ["a", "b", "c"]


def test_a_request_does_not_wait_for_mates_past_its_deadline() -> None:
    waiting = queue(max_delay=2)
    waiting.push("urgent", group="a", arrival=10, deadline=12)
    assert waiting.ready_at() == -math.inf
    assert waiting.take(10) == ["urgent"]


def test_many_groups_are_served_in_the_order_of_their_deadlines() -> None:
    waiting: DeadlineQueue[int] = DeadlineQueue(Limits(max_batch=2))
    deadlines = [(7919 * i) % 997 for i in range(997)]
    for deadline in deadlines:
        waiting.push(deadline, group=deadline % 101, arrival=0, deadline=deadline + 1)
    heads = []
    while batch := waiting.take(0):
        assert len({item % 101 for item in batch}) == 1
        assert batch == sorted(batch)
        heads.append(batch[0])
    assert heads == sorted(heads)
    assert len(waiting) == 0


def held(waiting: DeadlineQueue[str]) -> int:
    """Entries in all heaps, those of tickets that stopped waiting included."""
    return sum(len(group.by_deadline) + len(group.by_arrival) for group in waiting._groups.values())


@pytest.mark.parametrize("deadline", [1.0, 1000.0])
def test_cancelled_requests_are_not_kept(deadline: float) -> None:
    waiting = queue()
    waiting.push("patient", group="a", arrival=0, deadline=500)
    for i in range(1000):
        waiting.cancel(waiting.push("impatient", group="a", arrival=i, deadline=deadline))
        assert held(waiting) <= 8


def test_taken_requests_are_not_kept_while_others_wait() -> None:
    waiting = queue(max_batch=1)
    waiting.push("patient", group="a", arrival=0, deadline=1e9)
    for i in range(1000):
        waiting.push("hasty", group="a", arrival=i, deadline=i + 10)
        waiting.push("hasty", group="a", arrival=i, deadline=i + 10)
        assert waiting.ready_at() == -math.inf  # full, so that nobody asks for the oldest
        assert waiting.take(i) == ["hasty"]
        assert waiting.take(i) == ["hasty"]
        assert held(waiting) <= 12


def test_a_group_that_is_done_is_forgotten() -> None:
    waiting = queue()
    for i in range(100):
        push(waiting, "ab", group=i)
        assert waiting.take(0) == ["a", "b"]
    assert not waiting._groups


@dataclass
class Entry:
    """A request as the naive model knows it."""

    item: int
    group: int
    arrival: float
    deadline: float


class AgainstANaiveQueue(RuleBasedStateMachine):
    """The queue does what a sorted list would."""

    tickets = Bundle("tickets")

    def __init__(self) -> None:
        super().__init__()
        self.items = count()
        self.now = 0.0
        self.limits = Limits(max_batch=3, max_delay=2)
        self.queue: DeadlineQueue[int] = DeadlineQueue(self.limits)
        self.naive: list[Entry] = []

    @rule(
        target=tickets,
        group=st.integers(0, 3),
        allowed=st.one_of(st.integers(0, 6).map(float), st.just(math.inf)),
        ago=st.integers(0, 2),
    )
    def push(self, group: int, allowed: float, ago: int) -> tuple[Ticket[int], Entry]:
        entry = Entry(next(self.items), group, self.now - ago, self.now + allowed)
        self.naive.append(entry)
        ticket = self.queue.push(entry.item, group=group, arrival=entry.arrival, deadline=entry.deadline)
        return ticket, entry

    @rule(chosen=consumes(tickets), again=st.booleans())
    def cancel(self, chosen: tuple[Ticket[int], Entry], again: bool) -> None:
        ticket, entry = chosen
        assert self.queue.cancel(ticket) == (entry in self.naive)
        if entry in self.naive:
            self.naive.remove(entry)
        if again:
            assert not self.queue.cancel(ticket)

    @rule(seconds=st.integers(0, 3))
    def time_passes(self, seconds: int) -> None:
        self.now += seconds

    @rule()
    def take(self) -> None:
        self.naive = [entry for entry in self.naive if entry.deadline > self.now]
        expected = self.next_group()[: self.limits.max_batch]
        assert self.queue.take(self.now) == [entry.item for entry in expected]
        self.naive = [entry for entry in self.naive if entry not in expected]

    @precondition(lambda self: self.naive)
    @rule()
    def empty(self) -> None:
        while self.naive:
            self.take()

    @invariant()
    def as_many_wait(self) -> None:
        assert len(self.queue) == len(self.naive)

    @invariant()
    def the_next_batch_starts_at_the_same_time(self) -> None:
        group = self.next_group()
        if not group:
            expected = None
        else:
            sizes = [sum(entry.group == g for entry in self.naive) for g in range(4)]
            start = min(entry.arrival for entry in group) + self.limits.max_delay
            at_once = max(sizes) >= self.limits.max_batch or start >= group[0].deadline
            expected = -math.inf if at_once else start
        assert self.queue.ready_at() == expected

    @invariant()
    def little_is_kept_of_those_who_left(self) -> None:
        for members in self.queue._groups.values():
            assert members.size > 0
            assert max(len(members.by_deadline), len(members.by_arrival)) <= 2 * members.size

    def next_group(self) -> list[Entry]:
        """Everybody in the group of the earliest deadline, in order."""
        waiting = sorted(self.naive, key=lambda entry: (entry.deadline, entry.item))
        return [entry for entry in waiting if entry.group == waiting[0].group]


AgainstANaiveQueue.TestCase.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)
TestAgainstANaiveQueue = AgainstANaiveQueue.TestCase
