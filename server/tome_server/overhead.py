"""What a request takes besides its batch: decoding before it, the way back to the caller after it."""

from collections import deque
from dataclasses import dataclass, field

# Replies whose way back from the device says what the next one's will take, and the share that it must be enough for.
REPLIES_REMEMBERED = 64
REPLIES_IN_TIME = 0.95
# How fast the estimate of what decoding takes follows.
DECODE_RATE = 0.1


@dataclass
class Overhead:
    """What a request takes before and after its batch, in seconds, as the latest ones did."""

    least_margin: float
    """The least that is kept back for the way back."""
    decoding: float = 0.0
    """About what decoding takes."""
    _ways_back: deque[float] = field(default_factory=lambda: deque([0.0], REPLIES_REMEMBERED), init=False)

    @property
    def margin(self) -> float:
        """What to keep back from a deadline for the way from the device to the caller."""
        ranked = sorted(self._ways_back)
        return max(self.least_margin, ranked[int(REPLIES_IN_TIME * (len(ranked) - 1))])

    def decoded(self, seconds: float) -> None:
        """Learn what decoding an image took."""
        self.decoding += DECODE_RATE * (seconds - self.decoding)

    def replied(self, seconds: float) -> None:
        """Learn what a reply took from the device's last operation until it was finished."""
        self._ways_back.append(seconds)
