"""One model's requests from arrival to the device: admitted, ordered, decided on. Pure: the caller knows the time."""

import logging
import math
from typing import Any, Generic, TypeVar

from tome_server.errors import InfeasibleError
from tome_server.scheduling.policy.view import Decision, Policy, View, largest, uniform
from tome_server.scheduling.profile import Latency
from tome_server.scheduling.queue import DeadlineQueue, Waiting
from tome_server.scheduling.traffic import HORIZON, TrafficMeter

T = TypeVar("T")

log = logging.getLogger(__name__)

_IMAGES_IN_HORIZON = 20


class Scheduler(Generic[T]):
    """Holds the requests that wait and says, whenever the device is free, what it does next.

    Times are seconds of the caller's clock, which must not run backwards.
    """

    def __init__(self, latency: Latency, policy: Policy) -> None:
        self.latency = latency
        self.policy_failures = 0
        """Decisions that the policy raised on, and that were made without it."""
        self._policy = policy
        self._queue: DeadlineQueue[T] = DeadlineQueue()
        # A rate is that of several requests, however long each takes.
        self._traffic = TrafficMeter(max(HORIZON, _IMAGES_IN_HORIZON * latency.profile.p50[0][0]))

    def __len__(self) -> int:
        return len(self._queue)

    @property
    def deadline(self) -> float:
        """The earliest deadline of those who wait, infinite if nobody does."""
        first = self._queue.first()
        return first.deadline if first else math.inf

    def arrived(self, now: float, budget: float) -> None:
        """Count an arrival that allows `budget` seconds, whatever becomes of it: policies look at the traffic."""
        self._traffic.add(now, budget)

    def check(self, request: Waiting[Any], now: float, free_at: float) -> None:
        """Raise InfeasibleError if a deadline can't be met though all with an earlier one be merged the most.

        The device will be free at `free_at`.
        """
        ahead = self._queue.due_by(request.deadline)
        if self._ends(max(now, free_at), ahead, request.high) > request.deadline:
            # Sooner might do, ahead of others who would then be late; that is no answer to who asks for later.
            raise InfeasibleError(self.earliest(now, free_at, request.high, request.deadline) - request.arrival)

    def submit(self, request: Waiting[T], now: float, free_at: float) -> None:
        """Let a request wait. Raises InfeasibleError as `check` does."""
        self.check(request, now, free_at)
        self._queue.push(request)

    def earliest(self, now: float, free_at: float, high: int, after: float = -math.inf) -> float:
        """Return the earliest deadline from `after` on that `check` would let pass, for a highest level of `high`."""
        start = max(now, free_at)
        deadline = max(self._ends(start, 0, high), after)
        while (later := self._ends(start, self._queue.due_by(deadline), high)) > deadline:
            deadline = later
        return deadline

    def cancel(self, request: Waiting[T]) -> bool:
        """Take out a request; returns whether it still waited."""
        return self._queue.remove(request)

    def next(self, now: float) -> Decision | None:
        """Take out and return what the free device runs next and who is given up; None if nobody waits."""
        shed = self._drop_hopeless(now)
        if not self._queue:
            return Decision((), (), shed) if shed else None
        view = View(now, list(self._queue), self.latency, self._traffic.at(now))
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

    def _ends(self, start: float, ahead: int, high: int) -> float:
        """Return when a request with `ahead` others before it ends if all are merged the most from `start` on."""
        largest, top = self.latency.max_batch, self.latency.levels - 1
        batches, rest = divmod(ahead, largest)
        return start + batches * self.latency.expected(largest, top) + self.latency.promised(rest + 1, high)


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
