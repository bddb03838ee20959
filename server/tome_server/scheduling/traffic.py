"""How requests come in: how fast, in what bursts, and how hasty."""

import math
from bisect import bisect_right
from collections import deque
from collections.abc import Sequence

from tome_server.scheduling.policy.view import Traffic

# Seconds over which the rate is taken: short enough to follow a ramp, while bursts show in the queue itself.
HORIZON = 2.0
# Arrivals over which the dispersion is taken.
_GAPS = 256
_BUDGETS = 64
_CLASSES = 4
_MOST_DISPERSED = 16.0
# Gaps that temper the rate of the first arrivals.
_TEMPERED = 16


def together(own: Traffic, others: Sequence[tuple[Traffic, float]]) -> Traffic:
    """Return the traffic of a device that serves others as well: each with what an image of it takes of one's own.

    In one's own images rates add up, and so do the variances of independent streams. Budgets stay one's own: a price
    that is to keep room for the hasty of another model was found to cost more than it gains where batches are long.
    """
    streams = [(own, 1.0), *((other, weight) for other, weight in others if other.rate > 0)]
    rate = sum(one.rate * weight for one, weight in streams)
    if len(streams) == 1 or rate <= 0:
        return own
    variance = sum(one.rate * weight**2 * one.dispersion for one, weight in streams)
    return Traffic(rate, min(max(variance / rate, 1.0), _MOST_DISPERSED), own.budgets)


class TrafficMeter:
    """Watches arrivals."""

    def __init__(self, horizon: float = HORIZON) -> None:
        """`horizon` is the time, in seconds, over which the rate is taken: an arrival weighs exp(-age / horizon)."""
        self._horizon = horizon
        self._began = math.inf
        self._last = -math.inf
        self._weight = 0.0
        self._count = 0
        self._gap = 0.0
        self._gap_squared = 0.0
        self._gaps = 0.0
        self._budgets: deque[float] = deque(maxlen=_BUDGETS)

    def add(self, now: float, budget: float) -> None:
        """Count an arrival at `now` that allows `budget` seconds. One without a deadline is no traffic: it can wait."""
        if math.isinf(budget):
            return
        if math.isinf(self._began):
            self._began = self._last = now
        else:
            keep, gap = 1 - 1 / _GAPS, now - self._last
            self._gap = self._gap * keep + gap
            self._gap_squared = self._gap_squared * keep + gap * gap
            self._gaps = self._gaps * keep + 1
        self._weight = self._weight * math.exp((self._last - now) / self._horizon) + 1.0
        self._last = now
        self._count += 1
        self._budgets.append(budget)

    def at(self, now: float) -> Traffic:
        """Return what has been seen until `now`."""
        if math.isinf(self._began):
            return Traffic()
        # Until the horizon is full, what has been seen stands for a shorter time. The first few are tempered: by an
        # eighth of the horizon, or by some of their gaps where they come faster than that.
        age, eighth = now - self._began, self._horizon / 8
        age += min(eighth, max(eighth, _TEMPERED * age) / self._count)
        seen = self._horizon * -math.expm1(-age / self._horizon)
        rate = self._weight * math.exp((self._last - now) / self._horizon) / seen
        dispersion = 1.0
        if (square := self._gap**2) > 0:  # a gap of a rounding error has none
            dispersion = min(max(self._gap_squared * self._gaps / square - 1.0, 1.0), _MOST_DISPERSED)
        return Traffic(rate, dispersion, self._quantiles())

    def _quantiles(self) -> tuple[tuple[float, float], ...]:
        ranked = sorted(self._budgets)
        quantiles = {ranked[-(-part * len(ranked) // _CLASSES) - 1] for part in range(1, _CLASSES + 1)}
        return tuple((budget, bisect_right(ranked, budget) / len(ranked)) for budget in sorted(quantiles))
