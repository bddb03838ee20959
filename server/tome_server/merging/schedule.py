"""The number of tokens to merge in each block (ToMe, section 4.1 "Merging schedule")."""

import itertools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Schedule:
    """The number of tokens to merge in each block of a model. Made by `constant`, `linear` or `explicit`."""

    r: int
    """Mean number of tokens merged in the blocks that merge; in an explicit schedule, the largest value."""
    inflect: float = 0.0
    """Slope over depth, in [-1, 1]; see `linear`."""
    start: int = 0
    """Number of blocks at the front that merge nothing."""
    values: tuple[int, ...] | None = None
    """The r of each block, in an explicit schedule."""

    @classmethod
    def constant(cls, r: int, start: int = 0) -> "Schedule":
        """Merge `r` tokens in every block after the first `start`.

        Raises:
            ValueError: `r` or `start` is negative.
            TypeError: one of them is no int.
        """
        return cls(_checked(r), start=_checked(start, "start"))

    @classmethod
    def linear(cls, r: int, inflect: float = -1.0) -> "Schedule":
        """Change r linearly with depth, merging as many tokens in total as `constant(r)`.

        Args:
            r: mean number of tokens to merge in a block.
            inflect: -1 falls from 2r to 0, 0 is constant, 1 rises from 0 to 2r.

        Raises:
            ValueError: `r` is negative, or `inflect` lies outside [-1, 1].
            TypeError: `r` is no int.
        """
        if not -1.0 <= inflect <= 1.0:
            raise ValueError(f"inflect must lie in [-1, 1], not {inflect}")
        return cls(_checked(r), inflect)

    @classmethod
    def explicit(cls, values: Iterable[int]) -> "Schedule":
        """Merge `values[i]` tokens in block i.

        Raises:
            ValueError: a value is negative, or there is none.
            TypeError: a value is no int.
        """
        checked = tuple(_checked(r) for r in values)
        if not checked:
            raise ValueError("an explicit schedule needs one r for each block")
        return cls(max(checked), values=checked)

    def per_block(self, depth: int) -> tuple[int, ...]:
        """Return the r of each of `depth` blocks.

        Raises:
            ValueError: the schedule has a value for each block of another depth.
        """
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
    """Return `r` itself if it is a schedule, or a constant schedule of it.

    Raises:
        ValueError: `r` is negative.
        TypeError: `r` is neither an int nor a Schedule.
    """
    return r if isinstance(r, Schedule) else Schedule.constant(r)


def mergeable(tokens: int, prefix: int) -> int:
    """Return the largest number of tokens that one block can merge: half of those that aren't prefix tokens."""
    return (tokens - prefix) // 2


def tokens_per_block(patches: int, prefix: int, per_block: Sequence[int]) -> tuple[int, ...]:
    """Return the number of tokens that leave each block, prefix tokens included.

    Args:
        patches: number of patches in the image.
        prefix: number of prefix tokens.
        per_block: tokens to merge in each block, clamped to what the block can merge.
    """
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
