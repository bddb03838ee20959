"""How many tokens each block merges (ToMe, section 4.1 "Merging schedule")."""

import itertools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Schedule:
    """Tokens to merge in each block of a model. Made by `constant`, `linear` or `explicit`."""

    r: int
    """Mean tokens merged a block that merges; of an explicit schedule, its largest value."""
    inflect: float = 0.0
    """Slope over depth, in [-1, 1]."""
    start: int = 0
    """Blocks, from the first, that merge nothing."""
    values: tuple[int, ...] | None = None
    """One r a block, where they were given one by one."""

    @classmethod
    def constant(cls, r: int, start: int = 0) -> "Schedule":
        """Merge `r` tokens in every block but the first `start`. Raises ValueError if one of them is negative."""
        return cls(_checked(r), start=_checked(start, "start"))

    @classmethod
    def linear(cls, r: int, inflect: float = -1.0) -> "Schedule":
        """Change r linearly with depth, merging as many tokens in all as `constant(r)`.

        `inflect` -1 falls from 2r to 0, 0 is constant, 1 rises from 0 to 2r. Raises ValueError if `r` is negative
        or `inflect` lies outside [-1, 1].
        """
        if not -1.0 <= inflect <= 1.0:
            raise ValueError(f"inflect must lie in [-1, 1], not {inflect}")
        return cls(_checked(r), inflect)

    @classmethod
    def explicit(cls, values: Iterable[int]) -> "Schedule":
        """Merge `values[i]` tokens in block i. Raises ValueError if one is negative or there is none."""
        checked = tuple(_checked(r) for r in values)
        if not checked:
            raise ValueError("an explicit schedule needs one r for each block")
        return cls(max(checked), values=checked)

    def per_block(self, depth: int) -> tuple[int, ...]:
        """Return the r of each of `depth` blocks. Raises ValueError if the schedule is for another depth."""
        if self.values is not None:
            if len(self.values) != depth:
                raise ValueError(f"the schedule has {len(self.values)} values, the model {depth} blocks")
            return self.values
        if self.start:
            return tuple(self.r if block >= self.start else 0 for block in range(depth))
        # Rounding the running total, not each value, keeps the total at r * depth.
        totals = [_half_up(self.r * (i + self.inflect * i * (i - depth) / max(depth - 1, 1))) for i in range(depth + 1)]
        return tuple(after - before for before, after in itertools.pairwise(totals))


def as_schedule(r: "int | Schedule") -> Schedule:
    """Return `r` as a schedule. Raises TypeError for anything but an int or a Schedule, ValueError if negative."""
    return r if isinstance(r, Schedule) else Schedule.constant(r)


def mergeable(tokens: int, prefix: int) -> int:
    """Return the most tokens one block can merge: half of those that aren't prefix tokens."""
    return (tokens - prefix) // 2


def tokens_per_block(patches: int, prefix: int, per_block: Sequence[int]) -> tuple[int, ...]:
    """Return how many tokens leave each block, prefix tokens included, for an image of `patches` patches."""
    counts = []
    tokens = patches + prefix
    for r in per_block:
        tokens -= min(r, mergeable(tokens, prefix))
        counts.append(tokens)
    return tuple(counts)


def _checked(r: int, name: str = "r") -> int:
    if isinstance(r, bool) or not isinstance(r, int):
        raise TypeError(f"{name} must be an int, not {type(r).__name__}")
    if r < 0:
        raise ValueError(f"{name} must not be negative, and is {r}")
    return r


def _half_up(value: float) -> int:
    return math.floor(value + 0.5)
