"""Simulates replicas that run the real scheduler on a virtual clock, with the latencies of a profile.

A discrete-event simulation. Each replica has the `Scheduler` of a server: admission, queue, policy, and a `Latency`
that learns from the batches it sees. Only the device is simulated: a batch takes the profile's median, times a random
factor, times a slowdown if there is one. Without torch, a second of a busy server takes milliseconds.
"""

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import Enum, auto
from heapq import heappop, heappush
from itertools import cycle
from typing import Literal

from tome_server.errors import InfeasibleError
from tome_server.scheduling.policy.view import Policy
from tome_server.scheduling.profile import Latency, Profile
from tome_server.scheduling.queue import Waiting
from tome_server.scheduling.scheduler import Scheduler
from tome_server.simulation.workload import Arrival

Dispatch = Literal["round_robin", "least_loaded"]

# No batch takes less than this share of its median, whatever the random factor.
_LEAST_JITTER = 0.2

# How requests end: each in exactly one of these ways.
_PENDING, _IN_TIME, _LATE, _REFUSED, _SHED, _LOST = range(6)


@dataclass(frozen=True)
class Slowdown:
    """A time in which batches take longer, for instance because of a noisy neighbour."""

    start: float
    """Seconds. Batches that begin from then on are slow."""
    end: float
    """Seconds. Batches that begin from then on aren't."""
    factor: float
    """How many times as long a slow batch takes."""


@dataclass(frozen=True)
class Death:
    """A replica that dies. Its requests are lost, and the balancer sends it no more."""

    at: float
    """Seconds."""
    replica: int
    """Counted from 0."""


@dataclass(frozen=True)
class Cluster:
    """What serves the requests: equal replicas behind a load balancer. All times are in seconds."""

    profile: Profile
    quality: Sequence[float]
    """Quality of an answer, by level of the profile."""
    policy: Callable[[Profile, Sequence[float]], Policy]
    """Makes each replica's policy, from the profile and the quality."""
    replicas: int = 1
    dispatch: Dispatch = "round_robin"
    """Which replica gets a request: the next in turn, or the one with the fewest requests queued or running."""
    jitter: float = 0.02
    """Standard deviation of a batch's time, as a share of its median."""
    reply: float = 0.0
    """From the end of a batch until the client has the answer. Schedulers know it and aim that much earlier."""
    between_batches: float = 0.0
    """Time that a device idles between two batches, for the decision on the next and the transfer of its images."""
    slowdowns: Sequence[Slowdown] = ()
    deaths: Sequence[Death] = ()
    blind: bool = False
    """Whether schedulers don't know deadlines, so that requests are served in order of arrival and none is refused or
    shed, as by servers without deadlines. Answers still count as in time or late."""
    retry: bool = False
    """Whether the requests of a dying replica are sent to another at once, as by a client that retries."""

    def __post_init__(self) -> None:
        """Raise ValueError for values out of range."""
        if len(self.quality) != len(self.profile.rs):
            raise ValueError(f"{len(self.profile.rs)} levels need as many qualities, not {len(self.quality)}")
        if self.replicas < 1:
            raise ValueError(f"there must be at least one replica, not {self.replicas}")
        if not all(0 <= death.replica < self.replicas for death in self.deaths):
            raise ValueError(f"replicas that die are counted from 0 to {self.replicas - 1}")
        if min(self.jitter, self.reply, self.between_batches) < 0:
            raise ValueError("jitter, reply and between_batches can't be negative")


@dataclass(frozen=True)
class Result:
    """How the requests ended. Each counts once, as in_time, late, refused, shed or lost."""

    requests: int
    in_time: int
    """Answered within their budgets."""
    late: int
    """Answered, but too late."""
    refused: int
    """Refused on arrival, because their deadlines could not be met."""
    shed: int
    """Given up while they were queued."""
    lost: int
    """Held by a replica that died, or arrived when none was left."""
    effective_accuracy: float
    """Quality averaged over all requests; one that wasn't answered in time counts 0."""
    mean_r: float
    """Of the requests answered; 0 if there were none."""
    mean_batch: float
    """Images in a batch; 0 without batches."""
    p50: float
    """Median seconds to an answer, late ones included; NaN if there was none."""
    p99: float
    """99th percentile, likewise."""
    busy: float
    """Share of the replicas' time, until the last answer, that was spent on batches."""
    wasted: float
    """Share of that time which went into requests that were late or lost."""
    batches: int
    policy_failures: int
    """Decisions that were made without the policy, because it failed."""

    @property
    def attainment(self) -> float:
        """Share of all requests that were answered in time."""
        return self.in_time / self.requests if self.requests else 1.0


def simulate(arrivals: Sequence[Arrival], cluster: Cluster, *, seed: int = 0) -> Result:
    """Return how `arrivals`, in order of time, end. `seed` determines the times that batches take."""
    return _Simulation(arrivals, cluster, seed).run()


class _Replica:
    """One server: a scheduler and a device."""

    __slots__ = ("alive", "began", "ends", "free_at", "levels", "running", "scheduler")

    def __init__(self, cluster: Cluster) -> None:
        policy = cluster.policy(cluster.profile, cluster.quality)
        self.scheduler: Scheduler[int] = Scheduler(Latency(cluster.profile), policy)
        self.alive = True
        self.running: Sequence[Waiting[int]] = ()
        self.levels: Sequence[int] = ()
        self.began = self.ends = 0.0
        self.free_at = -math.inf
        """When it expects to be free or, being free, last was; minus infinity until its first batch."""


class _Event(Enum):
    """What becomes of a replica."""

    ENDS = auto()
    """Its batch ends, and it is free for the next."""
    WAITED = auto()
    """It has waited long enough for batch-mates."""
    DIES = auto()


class _Simulation:
    """The state of one run."""

    def __init__(self, arrivals: Sequence[Arrival], cluster: Cluster, seed: int) -> None:
        self.arrivals = arrivals
        self.cluster = cluster
        self.top = len(cluster.profile.rs) - 1
        self.true = Latency(cluster.profile)  # observes no batch, and so keeps the profile's medians
        self.replicas = [_Replica(cluster) for _ in range(cluster.replicas)]
        self.turns = cycle(self.replicas)
        self.rng = random.Random(seed)
        self.outcomes = bytearray(len(arrivals))
        self.homes = [-1] * len(arrivals)
        """Which replica each request was sent to; kept only where some die."""
        # (time, serial number so that replicas are never compared, replica, what becomes of it)
        self.events: list[tuple[float, int, _Replica, _Event]] = []
        self.serial = 0
        self.latencies: list[float] = []
        self.by_level = [0] * (self.top + 1)
        """Answers, late ones included."""
        self.worth = 0.0
        self.busy = self.wasted = self.last = 0.0
        self.batches = 0

    def run(self) -> Result:
        arrivals, events = self.arrivals, self.events
        for death in self.cluster.deaths:
            self._schedule(death.at, self.replicas[death.replica], _Event.DIES)
        number, total = 0, len(arrivals)
        coming = arrivals[0].at if arrivals else math.inf
        woken: list[_Replica] = []
        while number < total or events:
            # An arrival at the very moment that a device becomes free is part of its decision.
            if number < total and (not events or coming <= events[0][0]):
                now = coming
                if (replica := self._submit(number, now)) and not replica.running:
                    woken.append(replica)
                number += 1
                coming = arrivals[number].at if number < total else math.inf
            else:
                now, _, replica, event = heappop(events)
                if event is _Event.DIES:
                    woken += self._die(replica, now)
                elif replica.alive:
                    if event is _Event.ENDS:
                        self._finish(replica, now)
                    woken.append(replica)
            if woken and coming > now:
                for replica in woken:
                    if not replica.running:
                        self._start(replica, now)
                woken.clear()
        return self._result()

    def _schedule(self, at: float, replica: _Replica, event: _Event) -> None:
        self.serial += 1
        heappush(self.events, (at, self.serial, replica, event))

    def _submit(self, number: int, now: float) -> _Replica | None:
        """Send a request to a replica; returns the replica, or None if the request isn't queued."""
        replica = self._choose()
        if replica is None:
            self.outcomes[number] = _LOST
            return None
        arrived, budget = self.arrivals[number]
        due = math.inf if self.cluster.blind else arrived + budget - self.cluster.reply
        request = Waiting(number, arrived, due, 0, self.top)
        scheduler = replica.scheduler
        scheduler.arrived(now, request.deadline - now)
        if not replica.running and not len(scheduler) and replica.free_at > -math.inf:
            try:
                scheduler.check(request, now, replica.free_at)
            except InfeasibleError:
                # The server does so too: while every request is refused, no batch shows that the machine has recovered.
                scheduler.latency.forget_slowness(now - replica.free_at)
                replica.free_at = now
        try:
            scheduler.submit(request, now, replica.free_at)
        except InfeasibleError:
            self.outcomes[number] = _REFUSED
            return None
        if self.cluster.deaths:
            self.homes[number] = self.replicas.index(replica)
        return replica

    def _choose(self) -> _Replica | None:
        if len(self.replicas) == 1:
            return self.replicas[0] if self.replicas[0].alive else None
        if self.cluster.dispatch == "round_robin":
            return next((one for one, _ in zip(self.turns, self.replicas, strict=False) if one.alive), None)
        alive = [replica for replica in self.replicas if replica.alive]
        return min(alive, key=lambda one: len(one.scheduler) + len(one.running), default=None)

    def _start(self, replica: _Replica, now: float) -> None:
        """Begin a free device's next batch, if there is one and it doesn't wait for mates."""
        scheduler = replica.scheduler
        if (start := scheduler.start(now)) > now:
            self._schedule(start, replica, _Event.WAITED)
            return
        while decision := scheduler.next(now):
            for request in decision.shed:
                self.outcomes[request.item] = _SHED
            if not decision.batch:
                continue
            replica.running, replica.levels, replica.began = decision.batch, decision.levels, now
            seconds = self.true.of_batch(decision.levels) * self._luck(now)
            between = self.cluster.between_batches
            replica.ends = now + seconds
            replica.free_at = now + scheduler.latency.of_batch(decision.levels, promised=True) + between
            self._schedule(replica.ends + between, replica, _Event.ENDS)
            return

    def _luck(self, now: float) -> float:
        """Return the factor on its median that a batch takes which begins now."""
        factor = max(_LEAST_JITTER, self.rng.gauss(1.0, self.cluster.jitter)) if self.cluster.jitter else 1.0
        for slowdown in self.cluster.slowdowns:
            if slowdown.start <= now < slowdown.end:
                factor *= slowdown.factor
        return factor

    def _finish(self, replica: _Replica, now: float) -> None:
        """Answer the requests of a batch that has ended."""
        batch, ends, late = replica.running, replica.ends, 0
        seconds = ends - replica.began
        replica.scheduler.latency.observe(replica.levels, seconds, ends)
        answered = ends + self.cluster.reply
        outcomes, quality, by_level, arrivals = self.outcomes, self.cluster.quality, self.by_level, self.arrivals
        for request, level in zip(batch, replica.levels, strict=True):
            latency = answered - request.arrival
            self.latencies.append(latency)
            by_level[level] += 1
            if ends <= request.deadline and latency <= arrivals[request.item].budget:
                outcomes[request.item] = _IN_TIME
                self.worth += quality[level]
            else:
                outcomes[request.item] = _LATE
                late += 1
        self.batches += 1
        self.busy += seconds
        self.wasted += seconds * late / len(batch)
        self.last = now
        replica.running = ()
        replica.free_at = now

    def _die(self, replica: _Replica, now: float) -> list[_Replica]:
        """Lose the requests of a replica, or send them to others; returns the replicas that they were sent to."""
        if not replica.alive:
            return []
        replica.alive = False
        if replica.running and replica.ends <= now:
            self._finish(replica, now)
        elif replica.running:
            spent = now - replica.began
            self.busy += spent
            self.wasted += spent
            self.last = now
            replica.running = ()
        index = self.replicas.index(replica)
        held = [
            number
            for number, (home, outcome) in enumerate(zip(self.homes, self.outcomes, strict=True))
            if home == index and outcome == _PENDING
        ]
        if self.cluster.retry:
            return [other for number in held if (other := self._submit(number, now))]
        for number in held:
            self.outcomes[number] = _LOST
        return []

    def _result(self) -> Result:
        total, answered = len(self.arrivals), len(self.latencies)
        ranked = sorted(self.latencies)
        time = self.last * len(self.replicas)
        return Result(
            requests=total,
            in_time=self.outcomes.count(_IN_TIME),
            late=self.outcomes.count(_LATE),
            refused=self.outcomes.count(_REFUSED),
            shed=self.outcomes.count(_SHED),
            lost=self.outcomes.count(_LOST),
            effective_accuracy=self.worth / total if total else 0.0,
            mean_r=_mean(self.by_level, self.cluster.profile.rs),
            mean_batch=answered / self.batches if self.batches else 0.0,
            p50=_quantile(ranked, 0.5),
            p99=_quantile(ranked, 0.99),
            busy=self.busy / time if time else 0.0,
            wasted=self.wasted / self.busy if self.busy else 0.0,
            batches=self.batches,
            policy_failures=sum(replica.scheduler.policy_failures for replica in self.replicas),
        )


def _mean(counts: Sequence[int], values: Sequence[int]) -> float:
    total = sum(counts)
    return sum(count * value for count, value in zip(counts, values, strict=True)) / total if total else 0.0


def _quantile(ranked: Sequence[float], share: float) -> float:
    """Return the smallest value that `share` of them don't exceed."""
    return ranked[max(0, math.ceil(share * len(ranked)) - 1)] if ranked else math.nan
