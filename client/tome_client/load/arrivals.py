"""When requests are sent: drawn, or read from a file, before the run begins."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count
from pathlib import Path

from tome_client.durations import parse_duration

_FORMS = "poisson, constant, gamma:CV2 such as gamma:4, or trace:FILE"


@dataclass(frozen=True, slots=True)
class Arrival:
    """One request to send."""

    at: float
    """Seconds since the start of the run."""
    budget: float | None = None
    """Seconds it may take; None where the plan's budgets decide."""


@dataclass(frozen=True, slots=True)
class Renewal:
    """Arrivals with independent, gamma-distributed gaps, which bursty traffic is commonly modelled with.

    Raises:
        ValueError: A rate that is not positive, or a negative cv2.
    """

    rate: float
    """Requests a second, on average."""
    cv2: float = 1.0
    """Squared coefficient of variation of the gaps: 0 for equal gaps, 1 for a Poisson process, more for bursts."""

    def __post_init__(self) -> None:
        if not 0 < self.rate < math.inf:
            raise ValueError(f"a rate is a number of requests a second above 0; got {self.rate}")
        if not 0 <= self.cv2 < math.inf:
            raise ValueError(f"a squared coefficient of variation is at least 0; got {self.cv2}")

    def draw(self, duration: float, rng: random.Random) -> Iterator[Arrival]:
        """Yields the arrivals of a run of `duration` seconds, in order."""
        if self.cv2 == 0:
            # Half a gap from either end, so that there are rate * duration of them, however these round.
            for number in range(round(self.rate * duration)):
                yield Arrival((number + 0.5) / self.rate)
            return
        shape, scale = 1 / self.cv2, self.cv2 / self.rate
        at = rng.gammavariate(shape, scale)
        while at < duration:
            yield Arrival(at)
            at += rng.gammavariate(shape, scale)


@dataclass(frozen=True, slots=True)
class Trace:
    """Arrivals as they were recorded."""

    arrivals: tuple[Arrival, ...]
    """In order of time; at least one."""

    @property
    def duration(self) -> float:
        """Seconds until the last arrival, which lies just inside."""
        return math.nextafter(self.arrivals[-1].at, math.inf)

    @property
    def rate(self) -> float:
        """Requests a second, on average."""
        return len(self.arrivals) / max(self.duration, 1e-3)

    def draw(self, duration: float, rng: random.Random) -> Iterator[Arrival]:  # noqa: ARG002 # As Renewal's.
        """Yields the arrivals before `duration` seconds."""
        return (arrival for arrival in self.arrivals if arrival.at < duration)


Arrivals = Renewal | Trace


def parse_arrivals(text: str, rate: float | None) -> Arrivals:
    """Returns the arrivals that a text such as "poisson", "gamma:4" or "trace:FILE" stands for.

    Args:
        text: What the command line says.
        rate: Requests a second; None for a trace, which has its own.

    Raises:
        ValueError: Written otherwise, a rate that is missing or too many, or a trace that is wrong, with its line.
        OSError: The trace cannot be read.
    """
    kind, _, detail = text.partition(":")
    if kind == "trace" and detail:
        if rate is not None:
            raise ValueError("a trace has its own rate: leave --rate out")
        return read_trace(Path(detail))
    match kind, detail:
        case "poisson", "":
            cv2 = 1.0
        case "constant", "":
            cv2 = 0.0
        case "gamma", _:
            try:
                cv2 = float(detail)
            except ValueError:
                raise ValueError(f"not arrivals: {text!r}; write {_FORMS}") from None
        case _:
            raise ValueError(f"not arrivals: {text!r}; write {_FORMS}")
    if rate is None:
        raise ValueError(f"{kind} arrivals need a rate: --rate, in requests a second")
    return Renewal(rate, cv2)


def read_trace(file: Path) -> Trace:
    """Reads a trace: a line for each request, its seconds since the start and, optionally, its budget: `0.0132 50ms`.

    Empty lines and what follows a # are passed over.

    Raises:
        ValueError: A line that says something else, or goes back in time, by its number; no request at all.
        OSError: The file cannot be read.
    """
    arrivals: list[Arrival] = []
    for number, line in zip(count(1), file.read_text().splitlines(), strict=False):
        words = line.partition("#")[0].split()
        if not words:
            continue
        try:
            arrivals.append(_arrival(words, arrivals[-1].at if arrivals else 0.0))
        except ValueError as error:
            raise ValueError(f"{file}:{number}: {error}") from None
    if not arrivals:
        raise ValueError(f"{file}: no request in it")
    return Trace(tuple(arrivals))


def _arrival(words: list[str], earliest: float) -> Arrival:
    if len(words) > 2:
        raise ValueError(f"seconds and perhaps a budget, such as `0.0132 50ms`; got {' '.join(words)!r}")
    try:
        at = float(words[0])
    except ValueError:
        raise ValueError(f"not a number of seconds: {words[0]!r}") from None
    if not earliest <= at < math.inf:
        raise ValueError(f"times must not be negative nor go back; got {words[0]} after {earliest:g}")
    return Arrival(at, parse_duration(words[1]) if len(words) == 2 else None)
