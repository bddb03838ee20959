"""What every policy is given, and what it gives back. Levels are indices into the r grid: 0 merges nothing."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from tome_server.scheduling.profile import Latency
from tome_server.scheduling.queue import Waiting


@dataclass(frozen=True, slots=True)
class Traffic:
    """How requests have been coming in lately."""

    rate: float = 0.0
    """Arrivals a second."""
    dispersion: float = 1.0
    """Variance of the arrivals in a stretch of time over their mean: 1 for Poisson arrivals, more for bursts."""
    budgets: tuple[tuple[float, float], ...] = ()
    """Latency budgets in seconds, ascending, each with the share of arrivals that allow no more."""


@dataclass(frozen=True, slots=True)
class View:
    """What a policy knows when the device is free."""

    now: float
    waiting: Sequence[Waiting[Any]]
    """All that wait, at least one, earliest deadline first; each could be met alone at its highest level."""
    latency: Latency
    traffic: Traffic


@dataclass(frozen=True, slots=True)
class Decision:
    """What to run next and whom to give up. Whoever is in neither goes on waiting."""

    batch: Sequence[Waiting[Any]]
    levels: Sequence[int]
    """One a member of the batch, within the member's bounds."""
    shed: Sequence[Waiting[Any]] = ()


class Policy(Protocol):
    """Decides what a free device does: a pure function of the view."""

    def __call__(self, view: View) -> Decision:
        """Return a batch, or whom to give up, or both; never neither."""
        ...


def largest(view: View, queue: Sequence[Waiting[Any]], level: int) -> int:
    """Return how many of the queue's first can end together at `level` by the earliest deadline; at least one."""
    slack, size = queue[0].due - view.now, 1
    while size < min(len(queue), view.latency.max_batch) and view.latency.promised(size + 1, level) <= slack:
        size += 1
    return size


def uniform(batch: Sequence[Waiting[Any]], level: int) -> Decision:
    """Return the decision to run `batch` at `level`, each member as near to it as its own bounds allow."""
    within = [level if one.low <= level <= one.high else min(max(level, one.low), one.high) for one in batch]
    return Decision(batch, within)
