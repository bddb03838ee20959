"""Published policies, to compare with or to use: a fixed r, and those of SuperServe (NSDI'25, section 4).

All take the earliest deadlines first, and run a batch that ends after its first member's deadline only if it is of one
image.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from tome_server.scheduling.policy.view import Decision, View, largest, uniform
from tome_server.scheduling.queue import Waiting


@dataclass(frozen=True)
class Fixed:
    """One r for every request whose bounds allow it, like a server whose model has a single cost."""

    level: int

    def __call__(self, view: View) -> Decision:
        """Return as many requests as are in time together, and give up those that would be late even alone."""
        late = [request for request in view.waiting if not self._makes(request, view)]
        gone = {id(request) for request in late}
        rest = [request for request in view.waiting if id(request) not in gone] if late else view.waiting
        if not rest:
            return Decision((), (), late)
        size = largest(view, rest, self.level)
        return Decision(rest[:size], uniform(rest[:size], self.level).levels, late)

    def _makes(self, request: Waiting[Any], view: View) -> bool:
        level = min(max(self.level, request.low), request.high)
        return view.now + view.latency.promised(1, level) <= request.due


def max_accuracy(view: View) -> Decision:
    """The least merging that the earliest deadline allows, then the largest batch that it allows at that level."""
    level = next(_fitting(view, 1), view.latency.levels - 1)
    return uniform(view.waiting[: largest(view, view.waiting, level)], level)


def max_batch(view: View) -> Decision:
    """The largest batch that the earliest deadline allows, then the least merging that it allows at that size."""
    top = view.latency.levels - 1
    size = largest(view, view.waiting, top)
    return uniform(view.waiting[:size], next(_fitting(view, size), top))


@dataclass(frozen=True)
class SlackFit:
    """Batches of each size and level, in buckets by latency: the slack chooses a bucket, then its largest batch."""

    buckets: int = 16

    def __call__(self, view: View) -> Decision:
        """Return the largest batch, then the least merging, of the slowest bucket that the earliest deadline allows."""
        latency, slack = view.latency, view.waiting[0].due - view.now
        shortest = latency.promised(1, latency.levels - 1)
        width = (latency.promised(latency.max_batch, 0) - shortest) / self.buckets
        choices = (
            (min(int((seconds - shortest) / width), self.buckets - 1) if width > 0 else 0, size, -level)
            for size in range(1, min(len(view.waiting), latency.max_batch) + 1)
            for level in range(latency.levels)
            if (seconds := latency.promised(size, level)) <= slack
        )
        _, size, level = max(choices, default=(0, 1, 1 - latency.levels))
        return uniform(view.waiting[:size], -level)


def _fitting(view: View, size: int) -> Iterator[int]:
    """Yield the levels at which a batch of `size` ends by the earliest deadline, least merging first."""
    slack = view.waiting[0].due - view.now
    return (level for level in range(view.latency.levels) if view.latency.promised(size, level) <= slack)
