"""What a policy gets and what it returns. A level is an index into the r grid: 0 merges nothing."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from tome_server.scheduling.profile import Latency
from tome_server.scheduling.queue import Waiting


@dataclass(frozen=True, slots=True)
class Traffic:
    """How requests have been arriving lately."""

    rate: float = 0.0
    """Arrivals a second."""
    dispersion: float = 1.0
    """Variance of the number of arrivals in a time over its mean: 1 for Poisson arrivals, more for bursts."""
    budgets: tuple[tuple[float, float], ...] = ()
    """Latency budgets in seconds, ascending, each with the share of arrivals whose budgets are no larger."""


@dataclass(frozen=True, slots=True)
class View:
    """What a policy knows when the device is free."""

    now: float
    waiting: Sequence[Waiting[Any]]
    """The queue, of at least one request, by `due`. Each could be met if it ran alone at its highest level."""
    latency: Latency
    traffic: Traffic


@dataclass(frozen=True, slots=True)
class Decision:
    """What to run next and which requests to give up. Those in neither stay in the queue."""

    batch: Sequence[Waiting[Any]]
    levels: Sequence[int]
    """One for each member of the batch, within the member's bounds."""
    shed: Sequence[Waiting[Any]] = ()


class Policy(Protocol):
    """Decides what a free device does next: a pure function of the view."""

    def __call__(self, view: View) -> Decision:
        """Return a batch, requests to give up, or both; never neither."""
        ...


@runtime_checkable
class Patient(Protocol):
    """A policy that may let a free device wait for batch-mates: a pure function of the view as well."""

    def patience(self, view: View) -> float:
        """Return how many seconds after its first request has come the queue may wait; 0 for not at all."""
        ...


def largest(view: View, queue: Sequence[Waiting[Any]], level: int) -> int:
    """Return how many of the first of `queue` can run together at `level` by the first one's due; at least one."""
    slack, size = queue[0].due - view.now, 1
    while size < min(len(queue), view.latency.max_batch) and view.latency.promised(size + 1, level) <= slack:
        size += 1
    return size


def uniform(batch: Sequence[Waiting[Any]], level: int) -> Decision:
    """Return the decision to run `batch` at `level`, each member as near to it as its bounds allow."""
    within = [level if one.low <= level <= one.high else min(max(level, one.low), one.high) for one in batch]
    return Decision(batch, within)
