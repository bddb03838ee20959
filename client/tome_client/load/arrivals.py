"""The times at which requests are sent: drawn, or read from a file, before the run begins."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tome_api import traces
from tome_api.traces import Arrival

_FORMS = "poisson, constant, gamma:CV2 such as gamma:4, or trace:FILE"


@dataclass(frozen=True, slots=True)
class Renewal:
    """Arrivals with independent, gamma-distributed gaps, a common model of bursty traffic.

    Raises:
        ValueError: The rate is not positive, or cv2 is negative.
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
            # Half a gap lies before the first and after the last, so that rounding can't change their number.
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
    """Recorded arrivals."""

    arrivals: tuple[Arrival, ...]
    """In order of time; at least one."""

    @property
    def duration(self) -> float:
        """Seconds until just after the last arrival."""
        return math.nextafter(self.arrivals[-1].at, math.inf)

    @property
    def rate(self) -> float:
        """Requests a second, on average."""
        return len(self.arrivals) / max(self.duration, 1e-3)

    def draw(self, duration: float, rng: random.Random) -> Iterator[Arrival]:  # noqa: ARG002 # The signature is that of Renewal.draw.
        """Yields the arrivals before `duration` seconds."""
        return (arrival for arrival in self.arrivals if arrival.at < duration)


Arrivals = Renewal | Trace


def parse_arrivals(text: str, rate: float | None) -> Arrivals:
    """Returns the arrivals that a text such as "poisson", "gamma:4" or "trace:FILE" stands for.

    Args:
        text: The value of --arrivals.
        rate: Requests a second; None for a trace, which has its own.

    Raises:
        ValueError: The text is something else, the rate is missing or superfluous, or a line of the trace is wrong.
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
    """Reads a trace in the format of `tome_api.traces`.

    Raises:
        ValueError: A line is wrong, or there is no request.
        OSError: The file cannot be read.
    """
    return Trace(traces.read_trace(file))
