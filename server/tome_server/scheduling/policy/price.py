"""Our policy: device time has a price, and each batch is judged by what it earns and by what it leaves in time.

A millisecond spent now on less merging is a millisecond that later requests won't have. If the device runs idle before
it ever runs out of time, the millisecond was free. If a request is lost first, it cost that request. So the price of
device time is

    price = (quality a saturated device makes in a second) x P(out of time before idle)

where P follows from how much work waits, how much more could wait before deadlines break, how fast requests come in
and in what bursts (`curve.py`). A price alone suits budgets of many batches. Where a budget is a few batches long, what
counts is who can still be met when this batch ends: a batch can't be stopped, and a newcomer waits for its end. So each
candidate, a size and a level, is judged by one step of look-ahead (`lookahead.py`):

    quality of its members - price x seconds + worth of the best batch after it, of the requests left and of newcomers

and the best candidate runs. Where requests come in bursts and budgets are that short, a free device first waits a
moment for batch-mates. Requests without a deadline run when no other request is queued, or where they cost no time.
"""

import math
from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import accumulate
from operator import attrgetter
from typing import Any

from tome_server.scheduling.policy.curve import between, price_curve, price_steps, rounded
from tome_server.scheduling.policy.lookahead import Lookahead
from tome_server.scheduling.policy.view import Decision, View, uniform
from tome_server.scheduling.profile import BySize, Profile
from tome_server.scheduling.queue import Waiting

# `python -m benchmarks.tune_policy` tries other values of the constants. Only patience changes more than 0.05 points.

# Of a newcomer's budget, the share that is kept back for what can't be foreseen.
_RESERVE = 0.1
# Backlog is reckoned in the smallest batches that are nearly as efficient as the largest.
_EFFICIENT = 0.95

# The least price at full load, as a share of the dearest: traffic may turn out to be nothing like what it has been. At
# less load it is less, and without any nothing.
_LEAST_SHARE = 0.002

# Device time cheaper than this share of the dearest is taken to be of no use to later requests.
_CHEAP = 0.02

# More merging is never taken to be better: quality is measured on some images, and rises by luck alone. Of levels
# that were measured alike, the one that merges less leads by this share.
_HAIR = 1e-4

# Where the variance of the arrivals is this many times that of Poisson arrivals, mates come in bursts, and the device
# waits for them, for this share of the tightest budget: `python -m benchmarks.tune_policy _BURSTS _PATIENCE`.
_BURSTS = 1.5
_PATIENCE = 0.02

# A batch that takes no more than this share longer costs nothing.
_FREE = 0.01
# Up to this many waiting, each size of batch is a candidate; of more, each size this much smaller than the last.
_EACH = 6
_COARSER = 0.8
# A smaller batch must be better by this share of a request's quality.
_CLOSE = 0.002


@dataclass(frozen=True, slots=True)
class _Outlook:
    """What device time is worth at present."""

    typical: int
    """The size of the batches that requests are likely to run in."""
    price: float
    """Quality for a second."""
    share: float
    """The price, as a share of the dearest."""
    lost: int
    """How many of those that wait can't be met."""


class Price:
    """Merges each batch as far as the price of device time and later requests ask, within the members' bounds."""

    def __init__(self, profile: Profile, quality: Sequence[float]) -> None:
        """`quality` is by level, positive. Raises ValueError if it has not one for each level of the profile."""
        if len(quality) != len(profile.rs) or min(quality) <= 0:
            raise ValueError(f"{len(profile.rs)} levels need as many positive qualities, not {list(quality)}")
        self._quality = _falling(quality)
        self._top = len(quality) - 1
        seconds = profile.every_size(profile.p50)
        # Of each batch size: what an image costs in it at each level, and so when each level is worth its price.
        self._steps = [
            price_steps(self._quality, tuple(value / size for value in row)) for size, row in enumerate(seconds[1:], 1)
        ]
        # Of each batch size: the quality of all its members, by level.
        self._earned = [[size * value for value in self._quality] for size in range(profile.max_batch + 1)]
        images_a_second = [size / row[-1] for size, row in enumerate(seconds[1:], 1)]
        enough = _EFFICIENT * max(images_a_second)
        self._candidates = _sizes(profile.max_batch)
        self._unit = next(size for size, speed in enumerate(images_a_second, 1) if speed >= enough)

    def __call__(self, view: View) -> Decision:
        """Return the batch and the levels that make the most of the time they take."""
        due = bisect_left(view.waiting, math.inf, key=_due)
        if not due:
            return self._in_a_gap(view)
        waiting = view.waiting[:due]
        merged = view.latency.by_size(self._top)
        outlook = self._outlook(view, waiting, merged)
        decision = self._best(view, waiting, outlook, merged)
        if outlook.share <= _CHEAP and len(decision.batch) < due:
            # So cheap a price heeds no newcomers, and must not cost those that wait their deadlines.
            unit, ends = min(outlook.typical, self._unit), view.now + view.latency.of_batch(decision.levels)
            if self._loses(view, waiting[len(decision.batch) :], ends, unit):
                decision = _in_time(view, waiting[: self._chunk(view, waiting, view.now, unit)], self._top)
        return self._joined(view, decision, view.waiting[due:])

    def patience(self, view: View) -> float:
        """Return how long a free device may wait for batch-mates.

        Requests that come right after a batch has begun wait for its end. Where the tightest budget is too short for
        that and a batch of them, those of a burst would be lost that came together but for an instant.
        """
        traffic, latency, size = view.traffic, view.latency, len(view.waiting)
        if size >= self._unit or traffic.dispersion < _BURSTS or not traffic.budgets:
            return 0.0
        tightest = traffic.budgets[0][0]
        ends = latency.promised(size, self._top) + latency.promised(min(self._unit, latency.max_batch), self._top)
        return _PATIENCE * tightest if tightest < ends and view.waiting[0].due < math.inf else 0.0

    def _outlook(self, view: View, waiting: Sequence[Waiting[Any]], merged: BySize) -> _Outlook:
        typical = self._typical(view, merged)
        image = merged.expected[typical] / typical
        share, lost = self._share(view, waiting, typical, merged)
        return _Outlook(typical, share * self._quality[self._top] / image, share, lost)

    def _typical(self, view: View, merged: BySize) -> int:
        """Return the size of batches at which the device answers the most of the traffic; of several, the fastest.

        In a batch's time the device finishes no more than its size, and takes in no more than the newcomers whose
        budgets last for what is left of it and for the next.
        """
        largest, traffic = view.latency.max_batch, view.traffic
        best, typical = (-math.inf, -math.inf), largest
        for size in self._candidates:
            if size > largest:
                continue
            seconds = merged.expected[size]
            speed, met, before = size / seconds, 0.0, 0.0
            if speed < best[0]:
                continue  # no more is answered than is finished
            for budget, part in traffic.budgets:
                if budget > seconds:
                    met += (part - before) * min(1.0, (budget - seconds) / seconds)
                before = part
            answered = min(speed, met * traffic.rate) if traffic.budgets else speed
            if (answered, speed) > best:
                best, typical = (answered, speed), size
        return typical

    def _share(self, view: View, waiting: Sequence[Waiting[Any]], typical: int, merged: BySize) -> tuple[float, int]:
        """Return the price, as a share of the dearest, and how many of those that wait can't be met.

        Each class of budgets has a queue of its own, as earliest deadline first serves it: the work due before the
        deadline of a newcomer of that class, and the arrivals that allow no more than it does. The dearest counts.
        """
        expected, traffic = merged.expected, view.traffic
        image, alone = expected[typical] / typical, expected[1]
        unit = min(typical, self._unit)
        burden = _burden(view, waiting, unit, self._top)
        shortest = burden * min(expected[1 : unit + 1])
        share, backlog, room, start, lost = _LEAST_SHARE * min(1.0, traffic.rate * image), 0.0, math.inf, 0, 0
        for budget, part in (*traffic.budgets, (math.inf, 0.0)):
            due = bisect_right(waiting, view.now + budget, lo=start, key=_due)
            while start < due:
                slack = waiting[start].due - view.now - backlog
                if slack < shortest:
                    # In a deep overload these are many, and counted at once.
                    met = bisect_left(waiting, view.now + backlog + shortest, lo=start + 1, hi=due, key=_due)
                    lost += met - start
                    start = met
                    continue
                size = min(unit, due - start)
                while (seconds := burden * expected[size]) > slack and size > 1:
                    size -= 1
                start += size
                if seconds > slack:
                    lost += size
                else:
                    backlog += seconds
                    room = min(room, slack - seconds)
            load = part * traffic.rate * image
            space = min(room, budget * (1 - _RESERVE) - backlog - alone)
            if space <= 0:
                share = max(share, min(1.0, load))
            elif part * traffic.rate > 0 and space < math.inf:
                span = backlog + space
                # Some of the arrivals of a stream, picked at random, are less dispersed than all.
                dispersion = 1 + part * (traffic.dispersion - 1)
                depth = span / (image * dispersion)
                curve = price_curve(self._steps[typical - 1], rounded(load), rounded(depth))
                share = max(share, between(curve, backlog / span))
        return (1.0, lost) if lost else (share, 0)

    def _chunk(self, view: View, queue: Sequence[Waiting[Any]], start: float, unit: int) -> int:
        """Return how many of the first of `queue`, at most `unit`, can run together from `start` on; at least one."""
        slack, size = queue[0].due - start, min(unit, len(queue))
        while size > 1 and view.latency.promised(size, self._top) > slack:
            size -= 1
        return size

    def _loses(self, view: View, queue: Sequence[Waiting[Any]], start: float, unit: int) -> bool:
        """Return whether any of `queue` is late if the device serves them from `start` on, merged the most."""
        latency, place = view.latency, 0
        while place < len(queue):
            size = self._chunk(view, queue[place : place + unit], start, unit)
            if start + latency.promised(size, self._top) > queue[place].due:
                return True
            start += latency.expected(size, self._top)
            place += size
        return False

    def _best(self, view: View, waiting: Sequence[Waiting[Any]], outlook: _Outlook, merged: BySize) -> Decision:
        """Return the batch that earns the most, with what it leaves to the next."""
        latency, quality, top, price = view.latency, self._quality, self._top, outlook.price
        drift = latency.drift
        dear = price * drift  # the price of a second of the medians
        ahead = Lookahead(view, waiting, quality, price, outlook.typical, merged)
        slacks = ahead.slacks
        best, chosen, close = -math.inf, (0, 1, top), _CLOSE * quality[top]
        for first, size in _batches(slacks, merged.promised, outlook.lost):
            medians = latency.medians(size)
            earns = [earned - dear * median for earned, median in zip(self._earned[size], medians, strict=True)]
            if max(earns) + ahead.at_most(size) <= best + close:
                continue  # whatever its level, it can't be the best
            leaves = ahead.after(drift * medians[top], first, size)
            worth, level = earns[top] + leaves, top
            for other in sorted(range(top), key=earns.__getitem__, reverse=True):
                if earns[other] + leaves <= worth:
                    break
                if latency.promised(size, other) > slacks[first]:
                    continue
                total = earns[other] + ahead.after(drift * medians[other], first, size)
                if total > worth:
                    worth, level = total, other
            if worth > best + close:
                best, chosen = worth, (first, size, level)
        first, size, level = chosen
        return _in_time(view, waiting[first : first + size], level)

    def _in_a_gap(self, view: View) -> Decision:
        """Return a batch of requests without deadlines: unmerged, and no longer than a newcomer can wait for."""
        latency = view.latency
        size, budgets = min(len(view.waiting), latency.max_batch), view.traffic.budgets
        if budgets:
            longest = budgets[0][0] - 2 * latency.promised(1, 0)
            while size > 1 and latency.promised(size, 0) > longest:
                size -= 1
        return uniform(view.waiting[:size], 0)

    def _joined(self, view: View, decision: Decision, others: Sequence[Waiting[Any]]) -> Decision:
        """Return the decision with as many of `others`, which have no deadline, as make the batch no longer."""
        if not others:
            return decision
        latency, levels = view.latency, list(decision.levels)
        longest = (1 + _FREE) * latency.of_batch(levels)
        mates = list[Waiting[Any]]()
        for other in others[: latency.max_batch - len(levels)]:
            level = min(max(levels[0], other.low), other.high)
            if latency.of_batch([*levels, level]) > longest:
                break
            levels.append(level)
            mates.append(other)
        return Decision([*decision.batch, *mates], levels, decision.shed) if mates else decision


def _batches(slacks: Sequence[float], promised: Sequence[float], lost: int) -> Iterator[tuple[int, int]]:
    """Yield the batches to consider, of the earliest deadlines: the place of the first member, and the size.

    `slacks` are those of the requests in order, and `promised` what batches take that are merged the most. Where some
    requests can't be met whatever is done, as many of the first, `lost`, may be passed over for a larger batch, which
    they would be too late for.
    """
    # The largest that the earliest deadline allows, and of those smaller some; larger ones only without the first.
    most = min(len(slacks), len(promised) - 1)
    fits = 1
    while fits < most and promised[fits + 1] <= slacks[0]:
        fits += 1
    sizes = _sizes(fits)
    if lost:
        sizes += tuple(size for size in _sizes(most) if size > fits)
    for size in sizes:
        first = bisect_left(slacks, promised[size]) if size > 1 else 0
        if first <= lost and first + size <= len(slacks):
            yield first, size


@cache
def _sizes(most: int) -> tuple[int, ...]:
    """Return the sizes of batches to consider, from the largest: each of a few, and some of many."""
    sizes = [most]
    while sizes[-1] > 1:
        last = sizes[-1]
        sizes.append(last - 1 if last <= _EACH else int(_COARSER * last))
    return tuple(sizes)


_due = attrgetter("due")


def _in_time(view: View, batch: Sequence[Waiting[Any]], level: int) -> Decision:
    """Return `batch` at `level`, less its last where members whose bounds forbid that level would make it late."""
    slack, decision = batch[0].due - view.now, uniform(batch, level)
    while len(batch) > 1 and view.latency.of_batch(decision.levels, promised=True) > slack:
        batch = batch[:-1]
        decision = uniform(batch, level)
    return decision


def _burden(view: View, waiting: Sequence[Waiting[Any]], size: int, top: int) -> float:
    """Return how much longer the queued requests take, each merged as far as it allows, than merged the most."""
    bound = [request.high for request in waiting if request.high < top]
    if not bound:
        return 1.0
    full = view.latency.expected(size, top)
    extra = sum(view.latency.expected(size, high) / full - 1 for high in bound)
    return 1 + extra / len(waiting)


def _falling(quality: Sequence[float]) -> tuple[float, ...]:
    return tuple(accumulate(quality, lambda before, own: min(own, before * (1 - _HAIR))))
