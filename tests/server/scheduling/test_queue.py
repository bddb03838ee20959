import math
from bisect import bisect_right
from itertools import count

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, rule

from tome_server.scheduling.queue import DeadlineQueue, Waiting


def request(item: str, deadline: float) -> Waiting[str]:
    return Waiting(item, 0.0, deadline, 0, 0)


def items(queue: DeadlineQueue[str]) -> str:
    return "".join(waiting.item for waiting in queue)


def filled(**deadlines: float) -> DeadlineQueue[str]:
    queue: DeadlineQueue[str] = DeadlineQueue()
    for item, deadline in deadlines.items():
        queue.push(request(item, deadline))
    return queue


def test_nobody_waits_in_an_empty_queue() -> None:
    queue = filled()
    assert len(queue) == 0
    assert queue.first() is None
    assert list(queue) == []
    assert queue.due_by(math.inf) == 0


def test_the_earliest_deadline_goes_first() -> None:
    assert items(filled(d=9, n=math.inf, a=1, c=5)) == "acdn"


def test_requests_that_tie_go_in_order_of_arrival() -> None:
    assert items(filled(e=5, b=5, x=1, a=5, n=math.inf, m=math.inf)) == "xebanm"


def test_a_request_can_be_taken_out_once() -> None:
    queue = filled(a=1, c=2)
    one = request("b", 1.5)
    queue.push(one)
    assert queue.holds([one])
    assert queue.remove(one)
    assert not queue.holds([one])
    assert not queue.remove(one)
    assert items(queue) == "ac"


def test_a_request_of_another_queue_is_not_taken_for_ones_own() -> None:
    queue, other = filled(a=1), filled(b=1)
    stranger = other.first()
    assert stranger is not None
    assert not queue.holds([stranger])
    assert not queue.holds([*queue, stranger])
    assert not queue.remove(stranger)
    assert items(queue) == "a"


def test_due_by_counts_those_of_that_very_deadline() -> None:
    queue = filled(a=1, b=2, c=2, d=3)
    assert [queue.due_by(deadline) for deadline in (0, 1, 1.5, 2, 3, math.inf)] == [0, 1, 1, 3, 4, 4]


class AgainstASortedList(RuleBasedStateMachine):
    """The queue does what a list would that is sorted by deadline and then by arrival."""

    waiting = Bundle("waiting")

    def __init__(self) -> None:
        super().__init__()
        self.items = count()
        self.queue: DeadlineQueue[int] = DeadlineQueue()
        self.model: list[Waiting[int]] = []

    @rule(target=waiting, deadline=st.one_of(st.integers(0, 6).map(float), st.just(math.inf)))
    def push(self, deadline: float) -> Waiting[int]:
        one = Waiting(next(self.items), 0.0, deadline, 0, 0)
        self.queue.push(one)
        self.model.append(one)
        self.model.sort(key=lambda waiting: (waiting.deadline, waiting.item))
        return one

    @rule(chosen=consumes(waiting), again=st.booleans())
    def remove(self, chosen: Waiting[int], again: bool) -> None:
        assert self.queue.remove(chosen) == (chosen in self.model)
        if chosen in self.model:
            self.model.remove(chosen)
        if again:
            assert not self.queue.remove(chosen)

    @rule(size=st.integers(1, 4))
    def take_the_first(self, size: int) -> None:
        self.queue.take(self.model[:size])
        del self.model[:size]

    @invariant()
    def they_are_in_the_same_order(self) -> None:
        assert list(self.queue) == self.model
        assert len(self.queue) == len(self.model)
        assert self.queue.first() == (self.model[0] if self.model else None)
        assert self.queue.holds(self.model)

    @invariant()
    def as_many_are_due(self) -> None:
        deadlines = [waiting.deadline for waiting in self.model]
        for deadline in (-1.0, 0.0, 2.5, 3.0, 6.0, math.inf):
            assert self.queue.due_by(deadline) == bisect_right(deadlines, deadline)


AgainstASortedList.TestCase.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)
TestAgainstASortedList = AgainstASortedList.TestCase
