"""Requests to simulate: when they come, and how long each may take. Drawn from a seed, or read from a file.

A stream of requests is a process of unit rate, stretched so that the rate is at each moment the one wanted (time
rescaling: Daley and Vere-Jones, An Introduction to the Theory of Point Processes, section 7.4). So ramps and spikes
come in bursts like any other traffic.
"""

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import NamedTuple, Protocol

from tome_server.durations import seconds_in


class Arrival(NamedTuple):
    """One request. Both in seconds."""

    at: float
    """Since the start."""
    budget: float
    """What its answer may take from then on."""


class Rate(Protocol):
    """How many requests a second come, over a stretch of time."""

    @property
    def duration(self) -> float:
        """Seconds it lasts."""
        ...

    def when(self, arrivals: float) -> float:
        """Return the second by which that many are expected; beyond the duration for more than come in it."""
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
        """As `Rate` says."""
        return arrivals / self.rate


@dataclass(frozen=True)
class Ramp:
    """A rate that grows, or falls, evenly. Raises ValueError for a rate or duration that isn't positive."""

    first: float
    """Requests a second at the start."""
    last: float
    """Requests a second at the end."""
    duration: float

    def __post_init__(self) -> None:
        _check(self.duration, self.first, self.last)

    def when(self, arrivals: float) -> float:
        """As `Rate` says."""
        # first t + growth t^2 / 2 = arrivals, solved without the cancellation that a small growth would bring. A rate
        # that falls reaches zero some time after the end, and no more come from then on.
        growth = (self.last - self.first) / self.duration
        under_root = self.first**2 + 2 * growth * arrivals
        return 2 * arrivals / (self.first + math.sqrt(under_root)) if under_root >= 0 else math.inf


@dataclass(frozen=True)
class Spike:
    """A steady rate that is several times as high for a while. Raises ValueError for what can't be."""

    rate: float
    """Requests a second before and after."""
    times: float
    """How many times that in between."""
    start: float
    """Second in which it begins."""
    seconds: float
    """How long it lasts."""
    duration: float

    def __post_init__(self) -> None:
        _check(self.duration, self.rate, self.times)
        if not 0 <= self.start <= self.start + self.seconds <= self.duration:
            raise ValueError(f"a spike from {self.start} s on for {self.seconds} s isn't within {self.duration} s")

    def when(self, arrivals: float) -> float:
        """As `Rate` says."""
        before, during = self.rate * self.start, self.rate * self.times * self.seconds
        if arrivals <= before:
            return arrivals / self.rate
        if arrivals <= before + during:
            return self.start + (arrivals - before) / (self.rate * self.times)
        return self.start + self.seconds + (arrivals - before - during) / self.rate


def draw(rate: Rate, budgets: Sequence[float], *, cv2: float = 1.0, seed: int = 0) -> list[Arrival]:
    """Return the requests of a run, each with one of `budgets` (seconds), all equally likely.

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
        found.append(Arrival(at, budgets[0] if len(budgets) == 1 else rng.choice(budgets)))
        passed += 1.0 if cv2 == 0 else rng.gammavariate(1 / cv2, cv2)
    return found


def read_trace(path: Path, budget: float | None = None) -> list[Arrival]:
    """Read recorded requests: one a line, seconds since the start and perhaps its budget, such as `0.0132 50ms`.

    The load generator of the client reads the same. Empty lines and what follows a # are passed over; `budget` is in
    seconds, for lines without one. Raises ValueError, naming the line, for what can't be read, goes back in time or
    lacks a budget, and for a file without requests; OSError if it can't be opened.
    """
    found: list[Arrival] = []
    for number, line in zip(count(1), path.read_text(encoding="utf-8").splitlines(), strict=False):
        if words := line.partition("#")[0].split(maxsplit=1):
            try:
                found.append(_recorded(words, found[-1].at if found else 0.0, budget))
            except ValueError as error:
                raise ValueError(f"{path}:{number}: {error}") from None
    if not found:
        raise ValueError(f"{path}: no request in it")
    return found


def parse_budgets(text: str) -> tuple[float, ...]:
    """Return the budgets, in seconds, that `draw` is to choose from: `50ms`, `mix:50ms,200ms` or `mix:50ms=3,200ms=1`.

    The load generator of the client reads the same. The last stands for three of 50 ms and one of 200 ms. Raises
    ValueError for other text.
    """
    kind, colon, choices = text.partition(":")
    if not colon:
        return (_budget(text),)
    found: list[float] = []
    for choice in choices.split(","):
        written, _, weight = choice.partition("=")
        if kind != "mix" or not (weight or "1").isdecimal() or not 0 < int(weight or "1") <= 1000:
            raise ValueError(f"{text!r} is no budget; write for example 50ms, mix:50ms,200ms or mix:50ms=3,200ms=1")
        found += [_budget(written)] * int(weight or "1")
    return tuple(found)


def _budget(text: str) -> float:
    if not (seconds := seconds_in(text)):
        raise ValueError(f"{text!r} is no budget; it must be above 0")
    return seconds


def _recorded(words: Sequence[str], earliest: float, budget: float | None) -> Arrival:
    try:
        at = float(words[0])
    except ValueError:
        raise ValueError(f"{words[0]!r} is no number of seconds") from None
    if not earliest <= at < math.inf:
        raise ValueError(f"times must not be negative nor go back; got {words[0]} after {earliest:g}")
    if len(words) == 2:
        return Arrival(at, _budget(words[1]))
    if budget is None:
        raise ValueError("it has no budget, and no other was given")
    return Arrival(at, budget)


def _check(duration: float, *rates: float) -> None:
    if not 0 < duration < math.inf or not all(0 < rate < math.inf for rate in rates):
        raise ValueError(f"rates and durations must be above 0; got {', '.join(map(str, (*rates, duration)))}")
