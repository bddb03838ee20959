"""Searches for a schedule that changes a model's answers less than a constant r does, for no more work.

Blocks differ in how similar their tokens are, and a token merged early saves more work than one merged late, so a
constant r is seldom best (DiffRate, arXiv 2305.17997, learns a rate for each block). Merging many tokens in few blocks
also saves the other blocks their matching, which takes more time than its multiply-accumulates suggest. The search
doesn't see images: a function that it is given judges each schedule.
"""

import itertools
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from tome_server.merging.schedule import tokens_per_block

PerBlock = tuple[int, ...]
Judge = Callable[[PerBlock], bool]
"""Runs a schedule and returns whether it is the best so far."""

# Where the merging blocks begin, as a share of the depth; what share of the remaining blocks they span; and how much
# the last of them merges, as a share of the first.
_BEGINS, _SPANS, _TILTS = (0.09, 0.0, 0.18), (1.0, 0.6), (1.0, 0.5)
_STEPS = (0.05, 0.1, 0.2)
_BISECTIONS = 14
# Moves to draw before giving up the search for one that wasn't tried before.
_DRAWS = 100


@dataclass(frozen=True)
class SearchSpace:
    """The schedules that are allowed: how many tokens there are to merge, in which blocks, and how much work."""

    patches: int
    prefix: int
    free: int
    """How many blocks, from the first, may merge any number of tokens."""
    rest: PerBlock
    """What the blocks after them merge."""
    fits: Callable[[PerBlock], bool]
    """Whether a schedule, one r for each block, takes no more work than is allowed. Merging more takes less work."""

    def fill(self, weights: Sequence[float]) -> PerBlock | None:
        """Return the schedule in proportion to `weights` that merges least and fits, or None if none does.

        `weights` has one weight for each free block. No block merges more than half of its tokens, prefix tokens aside.
        """
        if not any(weights):
            return None
        low, high = 0.0, self.patches / max(weights)
        if not self.fits(self._scaled(weights, high)):
            return None
        for _ in range(_BISECTIONS):
            middle = (low + high) / 2
            low, high = (low, middle) if self.fits(self._scaled(weights, middle)) else (middle, high)
        return self._trimmed(self._scaled(weights, high))

    def _scaled(self, weights: Sequence[float], scale: float) -> PerBlock:
        wanted = (*(int(scale * weight + 0.5) for weight in weights), *self.rest)
        counts = (self.patches + self.prefix, *tokens_per_block(self.patches, self.prefix, wanted))
        return tuple(before - after for before, after in itertools.pairwise(counts))

    def _trimmed(self, per_block: PerBlock) -> PerBlock:
        """Return `per_block` without the tokens that needn't be merged to fit, taken from the last block first."""
        for block in reversed(range(self.free)):
            while per_block[block] > 0:
                less = self._scaled((*per_block[:block], per_block[block] - 1, *per_block[block + 1 : self.free]), 1.0)
                if not self.fits(less):
                    break
                per_block = less
        return per_block


def search(
    space: SearchSpace, judge: Judge, *, blocks: int, trials: int, seed: int, start: PerBlock | None = None
) -> None:
    """Give up to `trials` schedules to `judge`, each only once. They merge in no more than `blocks` blocks.

    The search starts from `start`, scaled to fit, or from evenly spread blocks. Then it moves from the best schedule so
    far: part of what a block merges goes to another block, or all of it to one that merges nothing. The same arguments
    and judgements give the same schedules.
    """
    random_ = random.Random(seed)
    best: PerBlock | None = None
    tried: set[PerBlock] = set()
    for weights in [start[: space.free]] if start else _spread(space.free, blocks):
        made = space.fill(weights)
        if made is None or made in tried or len(tried) >= trials:
            continue
        tried.add(made)
        if judge(made) or best is None:
            best = made
    while best is not None and len(tried) < trials:
        moved = _untried(space, best, blocks, tried, random_)
        if moved is None:
            return
        tried.add(moved)
        if judge(moved):
            best = moved


def _spread(free: int, blocks: int) -> Iterator[list[float]]:
    """Yield weights of the free blocks. Up to `blocks` of them merge, evenly spaced, the same or falling with depth."""
    for span, tilt, begin in itertools.product(_SPANS, _TILTS, _BEGINS):
        first = round(begin * free)
        count = min(blocks, free - first)
        last = first + max(count, round(span * (free - first))) - 1
        weights = [0.0] * free
        for i in range(count):
            share = i / max(count - 1, 1)
            weights[first + round(i * (last - first + 1) / count)] = 1 + share * (tilt - 1)
        yield weights


def _untried(
    space: SearchSpace, best: PerBlock, blocks: int, tried: set[PerBlock], random_: random.Random
) -> PerBlock | None:
    for _ in range(_DRAWS):
        made = space.fill(_moved(best[: space.free], blocks, random_))
        if made is not None and made not in tried and sum(r > 0 for r in made[: space.free]) <= blocks:
            return made
    return None


def _moved(values: PerBlock, blocks: int, random_: random.Random) -> list[float]:
    """Return `values` as weights, changed by one move."""
    weights = [float(value) for value in values]
    merging = [block for block, weight in enumerate(weights) if weight]
    idle = [block for block, weight in enumerate(weights) if not weight]
    giver = random_.choice(merging)
    if idle and random_.random() < 0.4:  # all of it goes to a block that merges nothing, preferably a near one
        taker = min(random_.sample(idle, min(2, len(idle))), key=lambda block: abs(block - giver))
        weights[taker], weights[giver] = weights[giver], 0.0
        return weights
    takers = merging if len(merging) >= blocks else range(len(weights))
    taker = random_.choice(takers)
    step = min(weights[giver], random_.choice(_STEPS) * sum(weights))
    weights[giver] -= step
    weights[taker] += step
    return weights
