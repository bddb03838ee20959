"""What a request takes besides its batch: decoding before it, the reply after it.

Admission relies on these estimates, and the requests that it admits correct them. An estimate that is too high would
refuse the very requests that could correct it. So slowness is forgotten with time; speed is not, since a low estimate
admits requests that correct it.
"""

import math
import statistics
from collections import deque
from dataclasses import dataclass, field

# The margin must have been enough for this share of the latest replies, of which so many are remembered.
REPLIES_REMEMBERED = 64
REPLIES_IN_TIME = 0.95
# Seconds for which a measurement counts as current.
FRESH = 2.0
# The latest images of a kind, whose median is the estimate for the next: a single odd image doesn't change it.
_IMAGES_REMEMBERED = 9
# What even the smallest image costs, for resizing above all, in megapixels.
_LEAST_MEGAPIXELS = 0.1
# A stale estimate halves in so many times the seconds that it predicts, so that trying whether an expensive kind of
# image is still expensive takes no more than about a tenth of the time.
_HALF_LIFE = 4.0
_LEAST_HALF_LIFE = 0.5


@dataclass
class Margin:
    """Seconds to keep back from a deadline for the reply: from the batch's end until the caller has the answer."""

    least: float
    _replies: deque[tuple[float, float]] = field(default_factory=lambda: deque(maxlen=REPLIES_REMEMBERED), init=False)

    def add(self, now: float, seconds: float) -> None:
        """Learn how long a reply took, from the batch's end until it was finished."""
        self._replies.append((now, seconds))

    def at(self, now: float) -> float:
        """Return what was enough for 95 % of the replies of the last two seconds, and at least `least`."""
        fresh = sorted(seconds for at, seconds in self._replies if now - at <= FRESH)
        return max(self.least, fresh[int(REPLIES_IN_TIME * (len(fresh) - 1))]) if fresh else self.least


class DecodeTimes:
    """How long images take to decode: learned for each kind of input, per megapixel.

    An estimate is processor time, which neither a busy machine nor a stopped process makes longer, times the ratio of
    elapsed to processor time of the last two seconds. A kind that was never seen is estimated at no time.
    """

    def __init__(self) -> None:
        self._kinds: dict[str, _Kind] = {}
        self._stretches: deque[tuple[float, float]] = deque(maxlen=_IMAGES_REMEMBERED)

    def add(self, now: float, kind: str, megapixels: float, cpu_seconds: float, seconds: float) -> None:
        """Learn how long an image took: processor time, and elapsed time."""
        known = self._kinds.setdefault(kind, _Kind())
        known.rates.append(cpu_seconds / (megapixels + _LEAST_MEGAPIXELS))
        known.last = now
        if cpu_seconds > 0:
            self._stretches.append((now, max(1.0, seconds / cpu_seconds)))

    def seconds(self, now: float, kind: str, megapixels: float) -> float:
        """Return an estimate of how long an image takes in a thread."""
        known = self._kinds.get(kind)
        if known is None:
            return 0.0
        fresh = [stretch for at, stretch in self._stretches if now - at <= FRESH]
        cpu_seconds = statistics.median_low(known.rates) * (megapixels + _LEAST_MEGAPIXELS)
        seconds = cpu_seconds * (statistics.median_low(fresh) if fresh else 1.0)
        stale = max(0.0, now - known.last - FRESH)
        return seconds * math.pow(0.5, stale / max(_LEAST_HALF_LIFE, _HALF_LIFE * seconds))


@dataclass
class _Kind:
    rates: deque[float] = field(default_factory=lambda: deque(maxlen=_IMAGES_REMEMBERED))
    """Processor seconds a megapixel, of the latest images."""
    last: float = 0.0
    """When the latest of them was decoded."""
