"""The price of device time between idle and out of time, as a share of the dearest: a diffusion's, solved once.

The model is a queue in heavy traffic: the backlog, counted in the seconds that it would take at the most merging,
wanders like a Brownian motion between 0 (idle) and the most that can be finished in time.
"""

import math
from functools import lru_cache
from itertools import accumulate, pairwise

_STEPS = 40
# The logarithm by which the price's slope may change between idle and out of time; a float holds what is left then.
_STEEPEST = 680.0
# Traffic and backlog are rounded to this many steps a factor of e, so that curves can be used again.
_ROUNDING = 20
_ROUNDS = 40
_NEAR = 1e-6


def rounded(value: float) -> int:
    """Return a load or depth as `price_curve` takes it."""
    return round(math.log(value) * _ROUNDING)


def between(curve: tuple[float, ...], place: float) -> float:
    """Return the curve's value at `place` of [0, 1]."""
    step = min(int(place * _STEPS), _STEPS - 1)
    return curve[step] + (curve[step + 1] - curve[step]) * (place * _STEPS - step)


def price_steps(quality: tuple[float, ...], seconds: tuple[float, ...]) -> tuple[tuple[float, float], ...]:
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
