"""How a profile was measured: whether it may be relied on, and which of two is better."""

import math
from dataclasses import dataclass

# Fewer rounds can't tell a stall from what a batch takes.
LEAST_ROUNDS = 3
# Threads that wait for a CPU for this share of the time make batches take about as much longer: what predictions
# correct without anybody noticing, and what a machine that does nothing else stays far below.
MOST_LOAD = 0.1


@dataclass(frozen=True)
class Measured:
    """The circumstances under which a profile was measured."""

    rounds: int
    """How often each kind of batch was timed."""
    load: float | None
    """Share of the time for which threads that could have run waited for a CPU; None where the kernel doesn't say."""
    spread: float
    """95th percentile of the timings over their median."""
    extrapolated: bool = False
    """Whether no batch of several images was timed, and each is taken to cost as many times one image."""

    def __post_init__(self) -> None:
        """Raise ValueError for what no measurement gives."""
        if self.rounds < 0:
            raise ValueError(f"rounds can't be {self.rounds}")
        if self.load is not None and not 0 <= self.load <= 1:
            raise ValueError(f"load must lie in 0..1, not {self.load}")
        if not 0 < self.spread < math.inf:
            raise ValueError(f"spread must be above 0, not {self.spread}")

    @property
    def busy(self) -> bool:
        """Whether the machine was busy with something else meanwhile."""
        return self.load is not None and self.load > MOST_LOAD

    @property
    def provisional(self) -> bool:
        """Whether it should be measured again when there is a chance that this gives something better."""
        return self.busy or self.extrapolated or self.rounds < LEAST_ROUNDS

    def better_than(self, other: "Measured") -> bool:
        """Return whether a profile measured like this is to be preferred: less load, then more rounds."""
        return self._rank < other._rank

    @property
    def _rank(self) -> tuple[bool, float, bool, int]:
        # Loads that don't matter are all alike.
        return self.provisional, max(self.load or 0.0, MOST_LOAD), self.extrapolated, -self.rounds

    def __str__(self) -> str:
        """Say what makes it provisional, in words for the operator; empty if nothing does."""
        reasons = []
        if self.busy:
            reasons.append(f"while the machine was busy ({self.load:.0%} of the time waiting for a CPU)")
        if self.extrapolated:
            reasons.append("for too short a time to run batches of several images")
        elif self.rounds < LEAST_ROUNDS:
            reasons.append(f"in {self.rounds} of at least {LEAST_ROUNDS} rounds")
        return f"measured {' and '.join(reasons)}" if reasons else ""
