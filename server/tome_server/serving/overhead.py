"""What a request takes besides its batch: decoding before it, the way back to the caller after it.

Admission reads these estimates, and what is admitted corrects them. An estimate that is too high could so refuse for
ever what would correct it. Therefore a high one is believed only for a while: what is slow is forgotten with time, what
is fast is not, since the requests that a low estimate lets in correct it.
"""

import math
import statistics
from collections import deque
from dataclasses import dataclass, field

# Replies whose way back from the device says what the next one's will take, and the share that it must be enough for.
REPLIES_REMEMBERED = 64
REPLIES_IN_TIME = 0.95
# Seconds that a measurement says how things are now.
FRESH = 2.0
# Images of a kind that say what the next one takes. Their median heeds no single odd image.
_IMAGES_REMEMBERED = 9
# What every image costs however small it is, for resizing above all: as much as this many megapixels.
_LEAST_MEGAPIXELS = 0.1
# A stale estimate loses half of itself in so many times the seconds that it stands for, so that finding out whether a
# dear kind of image is still dear takes no more than a tenth or so of the time.
_HALF_LIFE = 4.0
_LEAST_HALF_LIFE = 0.5


@dataclass
class Margin:
    """What to keep back from a deadline for the way from the device to the caller, in seconds."""

    least: float
    _ways_back: deque[tuple[float, float]] = field(default_factory=lambda: deque(maxlen=REPLIES_REMEMBERED), init=False)

    def add(self, now: float, seconds: float) -> None:
        """Learn what a reply took from the device's last operation until it was finished."""
        self._ways_back.append((now, seconds))

    def at(self, now: float) -> float:
        """Return what 95 % of the replies of the last two seconds needed, and at least `least`."""
        fresh = sorted(seconds for at, seconds in self._ways_back if now - at <= FRESH)
        return max(self.least, fresh[int(REPLIES_IN_TIME * (len(fresh) - 1))]) if fresh else self.least


class DecodeTimes:
    """How long images take to decode: learned for each kind of input, by the megapixel.

    The time is that of the processor, which neither a busy machine nor a process that was stopped makes longer, times
    how much longer than that decoding has taken in the last two seconds. A kind that was never seen takes no time.
    """

    def __init__(self) -> None:
        self._kinds: dict[str, _Kind] = {}
        self._stretches: deque[tuple[float, float]] = deque(maxlen=_IMAGES_REMEMBERED)

    def add(self, now: float, kind: str, megapixels: float, cpu_seconds: float, seconds: float) -> None:
        """Learn what an image took, of the processor and in all."""
        known = self._kinds.setdefault(kind, _Kind())
        known.rates.append(cpu_seconds / (megapixels + _LEAST_MEGAPIXELS))
        known.last = now
        if cpu_seconds > 0:
            self._stretches.append((now, max(1.0, seconds / cpu_seconds)))

    def seconds(self, now: float, kind: str, megapixels: float) -> float:
        """Return about what an image takes in a thread."""
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
