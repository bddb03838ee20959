"""How a profile was measured: whether to rely on it, and which of two to prefer."""

import math
from dataclasses import dataclass

# Fewer rounds can't tell a stall from what a batch takes.
LEAST_ROUNDS = 3
# If threads wait for a CPU for this share of the time, batches take about as much longer. Predictions easily correct
# that much, and an otherwise idle machine stays far below it.
MOST_LOAD = 0.1


@dataclass(frozen=True)
class Measured:
    """The circumstances under which a profile was measured."""

    rounds: int
    """How often each kind of batch was timed."""
    load: float | None
    """Share of the time for which runnable threads waited for a CPU; None where the kernel doesn't report it."""
    spread: float
    """95th percentile of the timings over their median."""
    extrapolated: bool = False
    """Whether only single images were timed, and larger batches are assumed to cost as many times as much."""

    def __post_init__(self) -> None:
        """Raise ValueError for values that no measurement gives."""
        if self.rounds < 0:
            raise ValueError(f"rounds can't be {self.rounds}")
        if self.load is not None and not 0 <= self.load <= 1:
            raise ValueError(f"load must lie in 0..1, not {self.load}")
        if not 0 < self.spread < math.inf:
            raise ValueError(f"spread must be above 0, not {self.spread}")

    @property
    def busy(self) -> bool:
        """Whether the machine was busy with other work meanwhile."""
        return self.load is not None and self.load > MOST_LOAD

    @property
    def provisional(self) -> bool:
        """Whether to measure again when a better measurement may be possible."""
        return self.busy or self.extrapolated or self.rounds < LEAST_ROUNDS

    def better_than(self, other: "Measured") -> bool:
        """Return whether to prefer a profile measured like this: less load, then more rounds."""
        return self._rank < other._rank

    @property
    def _rank(self) -> tuple[bool, float, bool, int]:
        # Loads too small to matter rank equal.
        return self.provisional, max(self.load or 0.0, MOST_LOAD), self.extrapolated, -self.rounds

    def __str__(self) -> str:
        """Return, in words for the operator, what makes it provisional; empty if nothing does."""
        reasons = []
        if self.busy:
            reasons.append(f"while the machine was busy ({self.load:.0%} of the time waiting for a CPU)")
        if self.extrapolated:
            reasons.append("for too short a time to run batches of several images")
        elif self.rounds < LEAST_ROUNDS:
            reasons.append(f"in {self.rounds} of at least {LEAST_ROUNDS} rounds")
        return f"measured {' and '.join(reasons)}" if reasons else ""
