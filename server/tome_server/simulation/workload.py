"""Requests to simulate: when they arrive, and their budgets. Drawn from a seed, or read from a file.

A stream of requests is a process of unit rate, stretched in time to the rate wanted at each moment (time rescaling:
Daley and Vere-Jones, An Introduction to the Theory of Point Processes, section 7.4). So ramps and spikes have bursts
like any other traffic.
"""

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Protocol

from tome_api import traces


class Arrival(NamedTuple):
    """One request. Times are in seconds."""

    at: float
    """Since the start."""
    budget: float
    """Time that its answer may take from then on."""


class Rate(Protocol):
    """How many requests a second arrive, as a function of time."""

    @property
    def duration(self) -> float:
        """How many seconds the stream lasts."""
        ...

    def when(self, arrivals: float) -> float:
        """Return the second by which so many arrivals are expected; beyond the duration if it has fewer."""
        ...


@dataclass(frozen=True)
class Steady:
    """The same rate throughout. Raises ValueError for a rate or duration that isn't positive."""

    rate: float
    """Requests a second."""
    duration: float

    def __post_init__(self) -> None:
        _check(self.duration, self.rate)

    def when(self, arrivals: float) -> float:
        """Return the second by which so many arrivals are expected."""
        return arrivals / self.rate


@dataclass(frozen=True)
class Ramp:
    """A rate that grows or falls linearly. Raises ValueError for a rate or duration that isn't positive."""

    first: float
    """Requests a second at the start."""
    last: float
    """Requests a second at the end."""
    duration: float

    def __post_init__(self) -> None:
        _check(self.duration, self.first, self.last)

    def when(self, arrivals: float) -> float:
        """Return the second by which so many arrivals are expected."""
        # first t + growth t^2 / 2 = arrivals, solved without the cancellation that a small growth would bring. A rate
        # that falls reaches zero some time after the end, and no more come from then on.
        growth = (self.last - self.first) / self.duration
        under_root = self.first**2 + 2 * growth * arrivals
        return 2 * arrivals / (self.first + math.sqrt(under_root)) if under_root >= 0 else math.inf


@dataclass(frozen=True)
class Spike:
    """A steady rate that is several times as high for a while. Raises ValueError for values out of range."""

    rate: float
    """Requests a second before and after."""
    times: float
    """How many times as high it is in between."""
    start: float
    """Seconds from the start of the stream to that of the spike."""
    seconds: float
    """How long the spike lasts."""
    duration: float

    def __post_init__(self) -> None:
        _check(self.duration, self.rate, self.times)
        if not 0 <= self.start <= self.start + self.seconds <= self.duration:
            raise ValueError(f"a spike from {self.start} s on for {self.seconds} s isn't within {self.duration} s")

    def when(self, arrivals: float) -> float:
        """Return the second by which so many arrivals are expected."""
        before, during = self.rate * self.start, self.rate * self.times * self.seconds
        if arrivals <= before:
            return arrivals / self.rate
        if arrivals <= before + during:
            return self.start + (arrivals - before) / (self.rate * self.times)
        return self.start + self.seconds + (arrivals - before - during) / self.rate


def draw(
    rate: Rate, budgets: Sequence[float], *, weights: Sequence[float] = (), cv2: float = 1.0, seed: int = 0
) -> list[Arrival]:
    """Return the requests of a run, each with one of `budgets` (seconds), drawn by `weights` or all equally likely.

    `cv2` is the squared coefficient of variation of the gaps between them, which are gamma-distributed: 0 for equal
    gaps, 1 for a Poisson process, more for bursts. Raises ValueError for a negative one, and without a positive budget.
    """
    if not 0 <= cv2 < math.inf:
        raise ValueError(f"a squared coefficient of variation is at least 0; got {cv2}")
    if not budgets or not all(budget > 0 for budget in budgets):
        raise ValueError(f"budgets are seconds above 0; got {list(budgets)}")
    rng = random.Random(seed)
    found: list[Arrival] = []
    passed = 0.5 if cv2 == 0 else rng.gammavariate(1 / cv2, cv2)
    while (at := rate.when(passed)) < rate.duration:
        found.append(Arrival(at, _drawn(budgets, weights, rng)))
        passed += 1.0 if cv2 == 0 else rng.gammavariate(1 / cv2, cv2)
    return found


def read_trace(path: Path, budget: float | None = None) -> list[Arrival]:
    """Read recorded requests from a file in the format of `tome_api.traces`.

    `budget` is in seconds, for lines without one. Raises ValueError for a file that is no trace, and for a request
    without a budget or a deadline, since a simulation needs one; OSError if the file can't be opened.
    """
    return [_recorded(path, one, budget) for one in traces.read_trace(path)]


def _recorded(path: Path, request: traces.Arrival, default: float | None) -> Arrival:
    budget = default if request.budget is None else request.budget
    if budget is None:
        raise ValueError(f"{path}: the request at {request.at:g} s has no budget, and no other was given")
    if math.isinf(budget):
        raise ValueError(f"{path}: the request at {request.at:g} s has no deadline, and a simulation needs one")
    return Arrival(request.at, budget)


def _drawn(budgets: Sequence[float], weights: Sequence[float], rng: random.Random) -> float:
    if len(budgets) == 1:
        return budgets[0]
    return rng.choices(budgets, weights)[0] if len(set(weights)) > 1 else rng.choice(budgets)


def _check(duration: float, *rates: float) -> None:
    if not 0 < duration < math.inf or not all(0 < rate < math.inf for rate in rates):
        raise ValueError(f"rates and durations must be above 0; got {', '.join(map(str, (*rates, duration)))}")
