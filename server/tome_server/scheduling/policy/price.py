"""Our policy: device time has a price, and each request is merged just as far as that price asks.

A millisecond spent now on less merging is a millisecond that others won't have. If the device runs idle before it ever
runs out of time, nobody misses it, and it was free. If a request is lost first, it cost that request. So the price of
device time is

    price = (quality a saturated device makes in a second) x P(out of time before idle)

and the best r of a request maximises quality(r) - price * seconds(r). P follows from how much work waits, how much more
could wait before deadlines break, how fast requests come in and in what bursts; and from the price itself, which the
requests to come will be merged by as well. `price_curve` solves that.

The model behind it is a queue in heavy traffic: the backlog, counted in the seconds it would take at the most merging,
wanders like a Brownian motion between 0 (idle) and the most that can be finished in time.
"""

import math
from bisect import bisect_left
from collections.abc import Sequence
from functools import lru_cache
from itertools import accumulate, pairwise
from typing import Any

from tome_server.scheduling.policy.view import Decision, View, uniform
from tome_server.scheduling.profile import Profile
from tome_server.scheduling.queue import Waiting

# Of a newcomer's budget, the share that batches already begun may take before it is reached.
_RESERVE = 0.4
# Batches longer than this share of the hastiest budget are no use in reckoning what the device can do in time.
_TYPICAL = 0.4
# A newcomer needs this share of its budget, and one image's time, once the device is free.
_OWN = 0.3
# Bursts are as strong as their dispersion says only over long stretches; over one budget, about half.
_DISPERSION = 0.5
# Backlog is reckoned in the smallest batches that are nearly as efficient as the largest.
_EFFICIENT = 0.95

# The least price at full load, as a share of the dearest: traffic may turn out to be nothing like what it has been. At
# less load it is less, and without any nothing.
_LEAST_SHARE = 0.002

# Time cheaper than this share of the dearest is taken to be of no use to anybody to come.
_CHEAP = 0.02

# More merging is never taken to be better: quality is measured on some images, and rises by luck alone. Of levels
# that were measured alike, the one that merges less leads by this share.
_HAIR = 1e-4

_STEPS = 40
# The logarithm by which the price's slope may change between idle and out of time; a float holds what is left then.
_STEEPEST = 680.0
# Traffic and backlog are rounded to this many steps a factor of e, so that curves can be used again.
_ROUNDING = 20
_ROUNDS = 40
_NEAR = 1e-6


class Price:
    """Merges each request as far as the present price of device time asks, within the request's bounds."""

    def __init__(self, profile: Profile, quality: Sequence[float]) -> None:
        """`quality` is by level, positive. Raises ValueError if it has not one for each level of the profile."""
        if len(quality) != len(profile.rs) or min(quality) <= 0:
            raise ValueError(f"{len(profile.rs)} levels need as many positive qualities, not {list(quality)}")
        self._quality = _falling(quality)
        self._top = len(quality) - 1
        seconds = profile.every_size(profile.p50)
        # Of each batch size: what an image costs in it at each level, and so when each level is worth its price.
        self._steps = [
            _steps(self._quality, tuple(value / size for value in row)) for size, row in enumerate(seconds[1:], 1)
        ]
        images_a_second = [size / row[-1] for size, row in enumerate(seconds[1:], 1)]
        enough = _EFFICIENT * max(images_a_second)
        self._unit = next(size for size, speed in enumerate(images_a_second, 1) if speed >= enough)

    def __call__(self, view: View) -> Decision:
        """Return the batch and the levels that make the most of the time they take."""
        latency, waiting, top = view.latency, view.waiting, self._top
        typical = self._typical(view)
        image = latency.expected(typical, top) / typical
        dearest = self._quality[top] / image
        share, lost = self._share(view, typical, image)
        first = self._worthiest(view, dearest, lost) if lost else 0
        decision = self._best(view, waiting[first : first + latency.max_batch], typical, dearest * share)
        if share > _CHEAP or len(decision.batch) == len(waiting):
            return decision
        # So cheap a price heeds nobody to come, and must not cost those who are here.
        unit, ends = min(typical, self._unit), view.now + latency.of_batch(decision.levels)
        if not self._loses(view, waiting[len(decision.batch) :], ends, unit):
            return decision
        return _in_time(view, waiting[: self._chunk(view, waiting, view.now, unit)], top)

    def _typical(self, view: View) -> int:
        """Return the size of the batches that most of the work is likely to be done in."""
        size = view.latency.max_batch
        if view.traffic.budgets:
            longest = _TYPICAL * view.traffic.budgets[0][0]
            while size > 1 and view.latency.expected(size, self._top) > longest:
                size -= 1
        return size

    def _share(self, view: View, typical: int, image: float) -> tuple[float, int]:
        """Return the price, as a share of the dearest, and how many of those who wait can't be met.

        Each class of budgets has a queue of its own, as earliest deadline first serves it: the work due before the
        deadline of a newcomer of that class, and the arrivals that allow no more than it does. The dearest counts.
        """
        latency, waiting, top, traffic = view.latency, view.waiting, self._top, view.traffic
        unit, total = min(typical, self._unit), len(waiting)
        chunk, alone = latency.expected(unit, top), latency.expected(1, top)
        burden = _burden(view, unit, top)
        depth_of = 1 / (image * max(1.0, _DISPERSION * traffic.dispersion))
        share, backlog, room, start, lost = _LEAST_SHARE * min(1.0, traffic.rate * image), 0.0, math.inf, 0, 0
        for budget, part in (*traffic.budgets, (math.inf, 0.0)):
            until = view.now + budget
            while start < total and waiting[start].deadline <= until:
                size = min(unit, total - start)
                slack = waiting[start].deadline - view.now - backlog
                seconds = burden * (chunk if size == unit else latency.expected(size, top))
                while seconds > slack and size > 1:
                    size -= 1
                    seconds = burden * latency.expected(size, top)
                start += size
                if seconds > slack:
                    lost += size
                else:
                    backlog += seconds
                    room = min(room, slack - seconds)
            space = min(room, budget * (1 - _RESERVE) - backlog - alone)
            if space <= 0:
                share = 1.0
            elif part * traffic.rate > 0 and space < math.inf:
                span = backlog + space
                curve = price_curve(
                    self._steps[typical - 1], _rounded(part * traffic.rate * image), _rounded(span * depth_of)
                )
                share = max(share, _between(curve, backlog / span))
        return (1.0, lost) if lost else (share, 0)

    def _chunk(self, view: View, queue: Sequence[Waiting[Any]], start: float, unit: int) -> int:
        """Return how many of the first of `queue`, at most `unit`, can run together from `start` on; at least one."""
        slack, size = queue[0].deadline - start, min(unit, len(queue))
        while size > 1 and view.latency.promised(size, self._top) > slack:
            size -= 1
        return size

    def _loses(self, view: View, queue: Sequence[Waiting[Any]], start: float, unit: int) -> bool:
        """Return whether any of `queue` is late if the device serves them from `start` on, merged the most."""
        latency, place = view.latency, 0
        while place < len(queue):
            size = self._chunk(view, queue[place : place + unit], start, unit)
            if start + latency.promised(size, self._top) > queue[place].deadline:
                return True
            start += latency.expected(size, self._top)
            place += size
        return False

    def _worthiest(self, view: View, price: float, lost: int) -> int:
        """Return how many of the first, at most `lost`, to leave behind so that a larger batch is in time."""
        latency, waiting, top = view.latency, view.waiting, self._top
        best, chosen, first = -math.inf, 0, 0
        for size in range(1, min(len(waiting), latency.max_batch) + 1):
            earliest = view.now + latency.promised(size, top)
            first = bisect_left(waiting, earliest, lo=first, key=lambda request: request.deadline)
            if first > lost or first + size > len(waiting):
                break
            worth = size * self._quality[top] - price * latency.expected(size, top)
            if worth > best:
                best, chosen = worth, first
        return chosen

    def _best(self, view: View, queue: Sequence[Waiting[Any]], typical: int, price: float) -> Decision:
        """Return the batch of the first of `queue` that gains most over what each of them is worth on average."""
        latency, top, quality = view.latency, self._top, self._quality
        net = [quality[level] - price * latency.expected(typical, level) / typical for level in range(top + 1)]
        level = max(range(top + 1), key=net.__getitem__)
        average = net[level]
        slack, alone = queue[0].deadline - view.now, latency.promised(1, top)
        hurdles, before = [], 0.0
        for budget, part in view.traffic.budgets:
            # Newcomers of this class are lost at this rate once a batch takes longer than that.
            hurdles.append((budget * (1 - _OWN) - alone, (part - before) * view.traffic.rate * quality[top]))
            before = part
        best, chosen = -math.inf, (1, top)
        expected, promised = latency.expected, latency.promised
        for size in range(1, len(queue) + 1):
            while (late := promised(size, level) > slack) and level < top:
                level += 1
            if late and size > 1:
                break
            seconds = expected(size, level)
            worth = size * (quality[level] - average) - price * seconds
            for free, losses in hurdles:
                if seconds > free:
                    worth -= losses * (seconds - free)
            if worth >= best:
                best, chosen = worth, (size, level)
        size, level = chosen
        return _in_time(view, queue[:size], level)


def _in_time(view: View, batch: Sequence[Waiting[Any]], level: int) -> Decision:
    """Return `batch` at `level`, less its last where members whose bounds forbid that level would make it late."""
    slack, decision = batch[0].deadline - view.now, uniform(batch, level)
    while len(batch) > 1 and view.latency.of_batch(decision.levels, promised=True) > slack:
        batch = batch[:-1]
        decision = uniform(batch, level)
    return decision


def _burden(view: View, size: int, top: int) -> float:
    """Return how much longer those who wait take, merged as far as each allows, than merged the most."""
    bound = [request.high for request in view.waiting if request.high < top]
    if not bound:
        return 1.0
    full = view.latency.expected(size, top)
    extra = sum(view.latency.expected(size, high) / full - 1 for high in bound)
    return 1 + extra / len(view.waiting)


def _rounded(value: float) -> int:
    return round(math.log(value) * _ROUNDING)


def _between(curve: tuple[float, ...], place: float) -> float:
    """Return the curve's value at `place` of [0, 1]."""
    step = min(int(place * _STEPS), _STEPS - 1)
    return curve[step] + (curve[step + 1] - curve[step]) * (place * _STEPS - step)


def _falling(quality: Sequence[float]) -> tuple[float, ...]:
    return tuple(accumulate(quality, lambda before, own: min(own, before * (1 - _HAIR))))


def _steps(quality: tuple[float, ...], seconds: tuple[float, ...]) -> tuple[tuple[float, float], ...]:
    """Return, for each level worth using as the price rises: the price from which it is, and its speed.

    The price as a share of the dearest, quality / seconds of the last level; the speed as a share of the last level's.
    """
    level, last = 0, len(quality) - 1
    steps = [(0.0, seconds[last] / seconds[0])]
    while level < last:
        costs = {
            other: (quality[level] - quality[other]) / (seconds[level] - seconds[other])
            for other in range(level + 1, last + 1)
            if seconds[other] < seconds[level]
        }
        if not costs:
            break
        level = min(costs, key=lambda other: (costs[other], -other))
        steps.append((max(0.0, costs[level]) * seconds[last] / quality[last], seconds[last] / seconds[level]))
    return tuple(steps)


@lru_cache(maxsize=8192)
def price_curve(steps: tuple[tuple[float, float], ...], load: int, depth: int) -> tuple[float, ...]:
    """Return the price, as a share of the dearest, at `_STEPS` + 1 even places from idle to out of time.

    `load` is the work that comes in, at the most merging, as a share of the device's time; `depth` how many images, at
    the most merging, fit between idle and out of time, over the dispersion of arrivals. Both as logarithms, in
    `_ROUNDING`ths.

    The price is a martingale while an optimal policy runs, so over the place s in [0, 1] it solves
    price'' = -2 depth (1 - speed(price) / load) price', price(0) = 0, price(1) = 1.
    """
    ratio, many = math.exp(load / _ROUNDING), math.exp(depth / _ROUNDING)
    ends = [*(min(price, 1.0) for price, _ in steps[1:]), 1.0]
    # price' depends on the price alone, and is linear in it between two steps: its growth there, and how far each step
    # lifts it above where it is least.
    growth = [min(max(-2 * many * (1 - speed / ratio), -_STEEPEST), _STEEPEST) for _, speed in steps]
    widths = [end - min(start, 1.0) for (start, _), end in zip(steps, ends, strict=True)]
    heights = list(accumulate((rate * width for rate, width in zip(growth, widths, strict=True)), initial=0.0))
    lowest = min(heights)
    pieces = [
        (width, rate, low - lowest, high - lowest)
        for width, rate, (low, high) in zip(widths, growth, pairwise(heights), strict=True)
    ]
    # The least of price' is that with which the whole way from price 0 to price 1 has length 1. Its logarithm is found
    # by false position, with the weight of an end that stays halved (the Illinois method).
    low, high = -_STEEPEST - 10.0, 0.0
    over, under = (sum(_length(piece, math.exp(log)) for piece in pieces) - 1.0 for log in (low, high))
    middle, side = high, 0
    for _ in range(_ROUNDS):
        middle = low + (high - low) * over / (over - under)
        miss = sum(_length(piece, math.exp(middle)) for piece in pieces) - 1.0
        if abs(miss) < _NEAR:
            break
        if miss > 0.0:
            low, over, under, side = middle, miss, under / 2 if side > 0 else under, 1
        else:
            high, under, over, side = middle, miss, over / 2 if side < 0 else over, -1
    least = math.exp(middle)
    curve: list[float] = []
    passed = price = 0.0
    for piece in pieces:
        width, rate, low, _ = piece
        length = _length(piece, least)
        while (place := len(curve) / _STEPS - passed) <= length and len(curve) < _STEPS:
            slope = low + least
            curve.append(price + slope * (math.expm1(rate * place) / rate if rate else place))
        passed += length
        price += width
    return tuple(min(price, 1.0) for price in curve) + (1.0,) * (_STEPS + 1 - len(curve))


def _length(piece: tuple[float, float, float, float], least: float) -> float:
    """Return how far it is, in place, along a piece of the way: over 1 / price', where that is linear in the price."""
    width, rate, low, high = piece
    first, last = low + least, high + least
    change = rate * width
    return math.log(last / first) / rate if abs(change) > 1e-6 * first else width / first
