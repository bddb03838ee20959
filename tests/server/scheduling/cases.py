"""Profiles, queues and policies that the tests of this folder share."""

import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from types import FrameType
from typing import Any

from hypothesis import strategies as st

from tome_server.scheduling.policy import policy_named
from tome_server.scheduling.policy.view import Decision, Policy, View
from tome_server.scheduling.profile import Latency, Profile
from tome_server.scheduling.queue import Waiting

# ViT-B/16 at r = 0, 4, … 16: top-1, and what is left of its work.
RS = (0, 4, 8, 12, 16)
QUALITY = (84.57, 84.39, 83.94, 82.86, 80.38)
WORK = (1.0, 0.873, 0.746, 0.621, 0.499)

NAMES = ("price", "fixed:0", "fixed:16", "max_accuracy", "max_batch", "slackfit")
# Those that choose r by the deadline, and so run whoever can be met at all.
ADAPTIVE = ("price", "max_accuracy", "max_batch", "slackfit")


def device(batch: float = 0.0025, image: float = 0.001, largest: int = 32, spread: float = 1.034) -> Profile:
    """One that takes so many seconds for a batch, and for each image at r = 0."""
    sizes = tuple(range(1, largest + 1))
    p50 = tuple(tuple(batch + image * size * share for share in WORK) for size in sizes)
    return Profile(sizes, RS, p50, tuple(tuple(spread * value for value in row) for row in p50))


def named(name: str) -> Callable[[Profile, Sequence[float]], Policy]:
    """What makes that policy."""
    return partial(policy_named, name)


@st.composite
def profiles(draw: st.DrawFn) -> Profile:
    """Devices that take some time for a batch and for each image in it, less the more is merged."""
    shares = [1.0]
    for _ in RS[1:]:
        shares.append(shares[-1] * draw(st.floats(0.7, 1.0)))
    batch, image = draw(st.floats(0, 0.1)), draw(st.floats(0.001, 0.1))
    sizes = (1, *sorted(draw(st.sets(st.integers(2, 16), max_size=3))))
    p50 = tuple(tuple(batch + image * size * share for share in shares) for size in sizes)
    spread = draw(st.floats(1, 1.5))
    p95 = tuple(tuple(value * spread for value in row) for row in p50)
    return Profile(sizes, RS, p50, p95, draw(st.floats(0, 0.01)), draw(st.booleans()))


@dataclass(frozen=True)
class Asked:
    """A request to be: its bounds, and its slack as a multiple of the least it needs."""

    slack: float
    low: int
    high: int

    def at(self, item: int, now: float, latency: Latency) -> Waiting[int]:
        """The request, arriving now."""
        return Waiting(item, now, now + self.slack * latency.promised(1, self.high), self.low, self.high)


def asked(least: float = 1.01, most: float = 60) -> st.SearchStrategy[Asked]:
    """Requests that, alone, can be met, unless their slack may be less than 1; some have no deadline."""
    levels = st.tuples(st.integers(0, len(RS) - 1), st.integers(0, len(RS) - 1)).map(sorted)
    wide = st.one_of(st.just([0, len(RS) - 1]), levels)
    slacks = st.one_of(st.floats(least, most), st.floats(least, 3), st.just(math.inf))
    return st.builds(lambda slack, ends: Asked(slack, *ends), slacks, wide)


def assert_fits(decision: Decision, view: View) -> None:
    """A decision may run and give up those who wait, each once, within their bounds and the largest batch."""
    members = [*decision.batch, *decision.shed]
    assert members
    assert len({id(request) for request in members}) == len(members)
    assert {id(request) for request in members} <= {id(request) for request in view.waiting}
    assert len(decision.batch) <= view.latency.max_batch
    for request, level in zip(decision.batch, decision.levels, strict=True):
        assert request.low <= level <= request.high


def steps(call: Callable[[], object]) -> int:
    """How many lines of Python a call runs: unlike its time, the same on every machine."""
    lines = 0

    def trace(_frame: FrameType, event: str, _given: object) -> Any:
        nonlocal lines
        lines += event == "line"
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        call()
    finally:
        sys.settrace(before)
    return lines
