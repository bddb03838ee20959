"""How requests arrive: at what rate, in what bursts, and with what budgets."""

import math
from bisect import bisect_right
from collections import deque
from collections.abc import Sequence

from tome_server.scheduling.policy.view import Traffic

# Seconds over which the rate is measured: short enough to follow a ramp; bursts show in the queue itself.
HORIZON = 2.0
# Arrivals over which the dispersion is measured.
_GAPS = 256
_BUDGETS = 64
_CLASSES = 4
_MOST_DISPERSED = 16.0
# Gaps by which the rate of the first arrivals is damped.
_TEMPERED = 16


def together(own: Traffic, others: Sequence[tuple[Traffic, float]]) -> Traffic:
    """Return the traffic of a shared device, in images of the model of `own`.

    `others` are the other models' traffic, each with the cost of one of its images as a multiple of one of `own`. In
    that unit rates add up, and so do the variances of independent streams. Budgets stay those of `own`: keeping room
    for another model's short budgets was found to cost more than it gains where batches are long.
    """
    streams = [(own, 1.0), *((other, weight) for other, weight in others if other.rate > 0)]
    rate = sum(one.rate * weight for one, weight in streams)
    if len(streams) == 1 or rate <= 0:
        return own
    variance = sum(one.rate * weight**2 * one.dispersion for one, weight in streams)
    return Traffic(rate, min(max(variance / rate, 1.0), _MOST_DISPERSED), own.budgets)


class TrafficMeter:
    """Measures the traffic of one model from its arrivals."""

    def __init__(self, horizon: float = HORIZON) -> None:
        """`horizon` is in seconds: an arrival counts for the rate with a weight of exp(-age / horizon)."""
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
        """Count an arrival at `now` with a budget in seconds. One without a deadline can wait, and doesn't count."""
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
        """Return the traffic measured until `now`."""
        if math.isinf(self._began):
            return Traffic()
        # Until the horizon is full, the arrivals stand for a shorter time. The rate of the first few is damped, as if
        # they had taken longer: by an eighth of the horizon, or by some of their gaps if they come faster than that.
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
