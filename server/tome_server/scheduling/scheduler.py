"""One model's requests from arrival to the device: admitted, ordered, decided on. Pure: the caller knows the time.

Several models may share a device. Then each scheduler knows the others: what they have due before a request is ahead of
it, at admission and when a batch is decided on, and no batch takes time that the others' requests were promised.
"""

import logging
import math
import sys
from collections.abc import Callable, Sequence
from typing import Any, Generic, TypeVar

from tome_server.errors import InfeasibleError
from tome_server.scheduling.policy.view import Decision, Policy, View, largest, uniform
from tome_server.scheduling.profile import Latency, Profile
from tome_server.scheduling.queue import DeadlineQueue, Waiting
from tome_server.scheduling.traffic import HORIZON, TrafficMeter, together

T = TypeVar("T")

log = logging.getLogger(__name__)

_IMAGES_IN_HORIZON = 20
# Deadlines that are tried one after the other to find the earliest that could be met.
_MOST_TRIED = 16


def at_once(_: float) -> float:
    """Say of a request of any deadline that it can begin as soon as the device is free."""
    return -math.inf


class Scheduler(Generic[T]):
    """Holds the requests that wait and says, whenever the device is free, what it does next.

    Times are seconds of the caller's clock, which must not run backwards.
    """

    def __init__(self, latency: Latency, policy: Policy) -> None:
        self.latency = latency
        self.policy_failures = 0
        """Decisions that the policy raised on, and that were made without it."""
        self.others: Sequence[Scheduler[Any]] = ()
        """The schedulers of the other models on the device: see `share_device`."""
        self._policy = policy
        self._queue: DeadlineQueue[T] = DeadlineQueue()
        # Admitted, and still being decoded.
        self._coming: DeadlineQueue[T] = DeadlineQueue()
        self._fastest = _fastest(latency.profile)
        # A rate is that of several requests, however long each takes.
        self._traffic = TrafficMeter(max(HORIZON, _IMAGES_IN_HORIZON * latency.profile.p50[0][0]))

    def decide_by(self, latency: Latency, policy: Policy) -> None:
        """Predict and decide by these from now on; those who wait go on waiting."""
        self.latency = latency
        self._policy = policy

    def __len__(self) -> int:
        return len(self._queue)

    @property
    def deadline(self) -> float:
        """The earliest deadline of those who wait, infinite if nobody does."""
        first = self._queue.first()
        return first.deadline if first else math.inf

    @property
    def urgency(self) -> tuple[float, float]:
        """Deadline and arrival of the request that is due first, both infinite without one."""
        first = self._queue.first()
        return (first.deadline, first.arrival) if first else (math.inf, math.inf)

    def arrived(self, now: float, budget: float) -> None:
        """Count an arrival that allows `budget` seconds, whatever becomes of it: policies look at the traffic."""
        self._traffic.add(now, budget)

    def check(
        self, request: Waiting[Any], now: float, free_at: float, ready: Callable[[float], float] = at_once
    ) -> None:
        """Raise InfeasibleError if a deadline can't be met though all with an earlier one be merged the most.

        The device will be free at `free_at`; `ready` says when a request of a given deadline is decoded, and does not
        fall as that rises. Takes O(log n) for each model, besides what `ready` takes.
        """
        if self._ends(max(now, free_at), request.deadline, request.high, ready) > request.deadline:
            # Sooner might do, ahead of others who would then be late; that is no answer to who asks for later.
            raise InfeasibleError(self.earliest(now, free_at, request.high, request.deadline, ready) - request.arrival)

    @property
    def expected(self) -> int:
        """How many requests were admitted and are still being decoded."""
        return len(self._coming)

    def expect(self, request: Waiting[T]) -> None:
        """Count a request that was admitted and is still being decoded as load, until `forget`."""
        self._coming.push(request)

    def forget(self, request: Waiting[T]) -> None:
        """Expect a request no longer."""
        self._coming.remove(request)

    def submit(self, request: Waiting[T], now: float, free_at: float) -> None:
        """Let a request wait. Raises InfeasibleError as `check` does."""
        self.check(request, now, free_at)
        self._queue.push(request)

    def earliest(
        self, now: float, free_at: float, high: int, after: float = -math.inf, ready: Callable[[float], float] = at_once
    ) -> float:
        """Return the earliest deadline from `after` on that `check` would let pass, for a highest level of `high`.

        Where very many deadlines would have to be tried, a later one that it lets pass as well.
        """
        start = max(now, free_at)
        deadline = max(self._ends(start, -math.inf, high, ready), after)
        for _ in range(_MOST_TRIED):
            if (later := self._ends(start, deadline, high, ready)) <= deadline:
                return deadline
            deadline = later
        # The latest deadline there is: requests without one give way.
        return max(deadline, self._ends(start, sys.float_info.max, high, ready))

    def cancel(self, request: Waiting[T]) -> bool:
        """Take out a request; returns whether it still waited."""
        return self._queue.remove(request)

    def next(self, now: float) -> Decision | None:
        """Take out and return what the free device runs next and who is given up; None if nobody waits."""
        shed = self._drop_hopeless(now)
        if not self._queue:
            return Decision((), (), shed) if shed else None
        view = self._view(now)
        try:
            decision = self._policy(view)
            _check(decision, self._queue, self.latency.max_batch)
        except Exception:
            self.policy_failures += 1
            log.exception("the policy failed; running the earliest deadlines at their most merging")
            decision = _without_policy(view)
        self._queue.take((*decision.batch, *decision.shed))
        return Decision(decision.batch, decision.levels, (*shed, *decision.shed))

    def _drop_hopeless(self, now: float) -> list[Waiting[T]]:
        """Take out those that would be late even if they ran alone, now, merged the most."""
        dropped = []
        while (first := self._queue.first()) and now + self.latency.promised(1, first.high) > first.deadline:
            self._queue.remove(first)
            dropped.append(first)
        return dropped

    def _ends(self, start: float, deadline: float, high: int, ready: Callable[[float], float]) -> float:
        """Return when a request ends if all due by its `deadline` are merged the most, and run from `start` on."""
        size, top = self._size, self.latency.levels - 1
        batches, rest = divmod(self._due_by(deadline), size)
        for other in self.others:
            start += other._work(deadline)
        begins = max(start + batches * self.latency.expected(size, top), ready(deadline))
        return begins + self.latency.promised(rest + 1, high)

    def _due_by(self, deadline: float) -> int:
        """Return how many must be done no later than `deadline`, of those that wait and those still being decoded."""
        return self._queue.due_by(deadline) + self._coming.due_by(deadline)

    def _work(self, deadline: float) -> float:
        """Return the seconds that those due by `deadline` take, merged the most."""
        size, top = self._size, self.latency.levels - 1
        batches, rest = divmod(self._due_by(deadline), size)
        seconds = batches * self.latency.expected(size, top)
        return seconds + self.latency.expected(rest, top) if rest else seconds

    def _view(self, now: float) -> View:
        """Return what the policy sees.

        On a shared device that is the traffic of all models, and requests that are due before their deadlines.
        """
        traffic, waiting = self._traffic.at(now), list(self._queue)
        if self.others:
            traffic = together(traffic, [(other._traffic.at(now), other._image / self._image) for other in self.others])
        for request, due in zip(waiting, self._dues(now, waiting), strict=True):
            request.due = due
        return View(now, waiting, self.latency, traffic)

    @property
    def _image(self) -> float:
        """Seconds that an image takes in the fastest batch, merged the most."""
        return self.latency.expected(self._size, self.latency.levels - 1) / self._size

    @property
    def _size(self) -> int:
        """The size of batches that work is reckoned in."""
        return self._fastest[self.latency.max_batch - 1]

    def _dues(self, now: float, waiting: Sequence[Waiting[T]]) -> list[float]:
        """Return by when each request must be done so that it and the other models' requests are in time.

        That is its deadline less the others' work due before it; and before the latest moment at which the others'
        requests that are due after it can begin, all merged the most in the fastest batches. Those of the others' that
        can't be met even if this model only runs one image before them don't count.
        """
        if not any(map(len, self.others)):
            return [request.deadline for request in waiting]
        least = now + self.latency.promised(1, waiting[0].high)
        limits: list[tuple[float, float, float]] = []
        work = 0.0
        for deadline, expected, promised in sorted(chunk for other in self.others for chunk in other._chunks()):
            if (latest := deadline - work - promised) >= least:
                work += expected
                limits.append((deadline, latest, work))
        dues, due = [], math.inf
        for request in reversed(waiting):
            while limits and limits[-1][0] > request.deadline:
                due = min(due, limits.pop()[1])
            due = min(due, request.deadline - (limits[-1][2] if limits else 0.0))
            dues.append(due)
        dues.reverse()
        # Policies count on it that each could be met alone, and comes in order.
        before = -math.inf
        for place, request in enumerate(waiting):
            alone = min(now + self.latency.promised(1, request.high), request.deadline)
            before = dues[place] = max(dues[place], alone, before)
        return dues

    def _chunks(self) -> list[tuple[float, float, float]]:
        """Return the batches of those who wait: the first's deadline, seconds expected, and promised."""
        full, top, waiting = self._size, self.latency.levels - 1, list(self._queue)
        sizes = ((first, min(full, len(waiting) - first)) for first in range(0, len(waiting), full))
        return [
            (waiting[first].deadline, self.latency.expected(size, top), self.latency.promised(size, top))
            for first, size in sizes
        ]


def share_device(schedulers: Sequence[Scheduler[Any]]) -> None:
    """Have each of these schedulers account for the load of the others; they are all that the device has."""
    for scheduler in schedulers:
        scheduler.others = [other for other in schedulers if other is not scheduler]


def _fastest(profile: Profile) -> list[int]:
    """Return, for each limit to batches from 1 on, the size within it that does the most images a second.

    Where batches are steep in their size, several small ones are done before a large one.
    """
    sizes, best = list[int](), 0.0
    for size, row in enumerate(profile.every_size(profile.p50)[1:], 1):
        faster = size / row[-1] >= best
        best = max(best, size / row[-1])
        sizes.append(size if faster else sizes[-1])
    return sizes


def _check(decision: Decision, queue: DeadlineQueue[T], largest: int) -> None:
    """Raise ValueError if the decision breaks a bound, the batch's limit, or names somebody who doesn't wait."""
    batch, levels, named = decision.batch, decision.levels, [*decision.batch, *decision.shed]
    if not named or len(set(map(id, named))) != len(named) or not queue.holds(named):
        raise ValueError("a decision must name some of those who wait, each once")
    if len(batch) > largest or len(batch) != len(levels):
        raise ValueError(f"a batch of {len(batch)} with {len(levels)} levels, of at most {largest}")
    if not all(request.low <= level <= request.high for request, level in zip(batch, levels, strict=True)):
        raise ValueError("a level is out of its request's bounds")


def _without_policy(view: View) -> Decision:
    """Return as many of the earliest deadlines as are in time together, merged the most."""
    top = view.latency.levels - 1
    return uniform(view.waiting[: largest(view, view.waiting, top)], top)
