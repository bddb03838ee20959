"""What a batch costs: measured latencies by batch size and r, and predictions that follow the machine's drift."""

import math
from bisect import bisect_left
from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise

from tome_server.scheduling.measured import Measured

# The latest batches, which show how fast the machine is now. Drift is their median, which ignores stalls and follows a
# real change of speed within five batches. Promises follow the second slowest, and so a change within two.
_RECENT = 9
# The share of batches that may break their promise: a little less than 5 %, so that 95 % keep it while this is learned.
_MISSES = 0.04
# How far one broken promise raises the margin of promises; 24 kept ones lower it by as much. After a long row of kept
# ones each lowers it further than the one before: with 4 % of misses so long a row is rare, and a margin that a noisy
# spell has doubled is gone after 300 good batches instead of 900.
_MARGIN_RATE = 0.02
_LONG_ROW = 50
_MARGIN_MOST = math.log(2)
# How far one batch moves the correction of its cell, the share of it that is forgotten, and the largest correction.
_CELL_STEP = 0.005
_CELL_LEAK = 0.002
_CELL_MOST = math.log(2)
# Seconds of idleness after which half of a machine's slowness is forgotten, where it refuses requests.
_HALF_LIFE = 0.5
# Seconds after which slowness that no batch has confirmed is stale, and again until half of it is forgotten, whatever
# else the device does: drift, which any batch confirms, and what takes many batches to learn.
_STALE_DRIFT = 60.0
_STALE = 300.0
# Seconds from one look for what is stale to the next.
_AGE_EVERY = 1.0
# Predictions that are further above the profile than this share are doubted.
_DOUBTED = 0.1


@dataclass(frozen=True)
class Profile:
    """Measured latency of uniform batches, in seconds; a level is an index into `rs`."""

    sizes: tuple[int, ...]
    """Batch sizes measured, ascending, from 1."""
    rs: tuple[int, ...]
    """The r grid, ascending, from 0."""
    p50: tuple[tuple[float, ...], ...]
    """Median, by size and level; falls with r and rises with size."""
    p95: tuple[tuple[float, ...], ...]
    """95th percentile, likewise."""
    extra_group: float = 0.0
    """What each further r in one call adds to the mean of its members' uniform batches."""
    one_call: bool = True
    """Whether a batch with several r runs faster in one call of the model than in one call for each r."""
    measured: Measured | None = field(default=None, compare=False)
    """How it was measured, where that was recorded."""

    def __post_init__(self) -> None:
        """Raise ValueError for values that no measurement gives."""
        shape = (len(self.sizes), len(self.rs))
        if not self.sizes or self.sizes[0] != 1 or list(self.sizes) != sorted(set(self.sizes)):
            raise ValueError(f"batch sizes must ascend from 1, not {self.sizes}")
        if not self.rs or self.rs[0] != 0 or list(self.rs) != sorted(set(self.rs)):
            raise ValueError(f"r values must ascend from 0, not {self.rs}")
        for name, table in (("p50", self.p50), ("p95", self.p95)):
            if (len(table), *{len(row) for row in table}) != shape:
                raise ValueError(f"{name} must have {shape[0]} rows of {shape[1]} values")
            if not all(0 < value < math.inf for row in table for value in row):
                raise ValueError(f"{name} must hold positive seconds")
            falls = all(a >= b for row in table for a, b in pairwise(row))
            rises = all(a <= b for column in zip(*table, strict=True) for a, b in pairwise(column))
            if not falls or not rises:
                raise ValueError(f"{name} must fall with r and rise with the batch size")
        if any(low > high for rows in zip(self.p50, self.p95, strict=True) for low, high in zip(*rows, strict=True)):
            raise ValueError("p95 can't be less than p50")
        if not 0 <= self.extra_group < math.inf:
            raise ValueError("extra_group must be seconds")

    @property
    def max_batch(self) -> int:
        """The largest batch measured."""
        return self.sizes[-1]

    @property
    def provisional(self) -> bool:
        """Whether it should be measured again: see `Measured.provisional`."""
        return self.measured is not None and self.measured.provisional

    def every_size(self, table: Sequence[Sequence[float]]) -> list[list[float]]:
        """Return `table` with a row for each size from 1 to the largest, interpolated; row 0 is of zeros."""
        rows = [[0.0] * len(self.rs)]
        for size in range(1, self.max_batch + 1):
            above = bisect_left(self.sizes, size)
            if self.sizes[above] == size:
                rows.append(list(table[above]))
                continue
            below = above - 1
            share = (size - self.sizes[below]) / (self.sizes[above] - self.sizes[below])
            rows.append([a + share * (b - a) for a, b in zip(table[below], table[above], strict=True)])
        return rows

    def level_of(self, r: int) -> int:
        """Return the level that costs what `r` does or, if `r` is between two levels, the more expensive one."""
        return max(0, bisect_left(self.rs, r + 1) - 1)


@dataclass(frozen=True, slots=True)
class BySize:
    """Seconds of uniform batches at one level, by size from 0 (no time) to the largest."""

    expected: Sequence[float]
    """Medians."""
    promised: Sequence[float]
    """Times within which 95 of 100 batches end."""


class Latency:
    """Predicts how long batches take, from a profile and from the latest batches.

    It learns three things, from fast to slow: how fast the machine is now (drift), how far latencies scatter above what
    is expected (the margin of promises), and where single cells, a size and a level, differ from the profile.

    Slowness that was learned and that no batch confirms any more is forgotten with time: each figure by its own clock.
    """

    def __init__(self, profile: Profile) -> None:
        self.profile = profile
        self.max_batch = profile.max_batch
        self.levels = len(profile.rs)
        self._measured = profile.every_size(profile.p50)
        self._median = [list(row) for row in self._measured]
        self._spread = [
            [high / low if low else 1.0 for high, low in zip(*rows, strict=True)]
            for rows in zip(profile.every_size(profile.p95), self._median, strict=True)
        ]
        self._cells: dict[tuple[int, int], float] = {}
        # When each was last corrected.
        self._corrected: dict[tuple[int, int], float] = {}
        self.learned_at = -math.inf
        """When the last batch was observed."""
        self._broken_at = -math.inf
        self._kept_in_a_row = 0
        self._aged_at = -math.inf
        # As log factors on the profile rather than on the prediction, so that old ones stay comparable as drift moves.
        self._recent: deque[float] = deque([0.0] * _RECENT, maxlen=_RECENT)
        # The cell of each, with level -1 for batches of several r; None for initial values, of no batch.
        self._recent_cells: deque[tuple[int, int] | None] = deque([None] * _RECENT, maxlen=_RECENT)
        self._drift = 1.0
        self._worst = 1.0
        self._log_margin = 0.0
        self._margin = 1.0
        # With this margin, promises equal the profile's medians.
        self._least_margin = -math.log(max(map(max, self._spread)))

    def allow(self, size: int) -> None:
        """Predict no batches larger than `size`, but at least of one image, so that policies run none."""
        self.max_batch = max(1, min(self.max_batch, size))

    @property
    def drift(self) -> float:
        """Time that batches take now over the time they were profiled at."""
        return self._drift

    def expected(self, size: int, level: int) -> float:
        """Return the median seconds of a uniform batch of 1 to `max_batch` images.

        Unlike the profile's, these may rise with the level, since each follows its own observations.
        """
        return self._median[size][level] * self._drift

    def promised(self, size: int, level: int) -> float:
        """Return the seconds within which 95 of 100 uniform batches end."""
        spread = max(1.0, self._spread[size][level] * self._margin)
        return self._median[size][level] * max(self._drift * spread, self._worst)

    def by_size(self, level: int) -> BySize:
        """Return `expected` and `promised` of every size at `level`, faster than one by one."""
        drift, margin, end = self._drift, self._margin, self.max_batch + 1
        # The smallest factor on a median: that of a cell without spread.
        slowest = max(drift, self._worst)
        medians = [row[level] for row in self._median[:end]]
        spreads = [row[level] for row in self._spread[:end]]
        promised = [
            median * (factor if (factor := drift * (spread * margin)) > slowest else slowest)
            for median, spread in zip(medians, spreads, strict=True)
        ]
        return BySize([median * drift for median in medians], promised)

    def medians(self, size: int) -> Sequence[float]:
        """Return the medians of a size by level, before drift: `drift` times these is `expected`."""
        return self._median[size]

    def of_batch(self, levels: Sequence[int], *, promised: bool = False) -> float:
        """Return the seconds of a batch whose members have these levels.

        In one call, that is the mean of their uniform batches and something for each further level; in one call for
        each level, the sum of the smaller batches.
        """
        predict, size = self.promised if promised else self.expected, len(levels)
        if levels.count(levels[0]) == size:
            return predict(size, levels[0])
        counts = Counter(levels)
        if not self.profile.one_call:
            return sum(predict(count, level) for level, count in counts.items())
        mean = sum(predict(size, level) * count for level, count in counts.items()) / size
        slowness = max(self._drift, self._worst) if promised else self._drift
        return mean + (len(counts) - 1) * self.profile.extra_group * slowness

    def observe(self, levels: Sequence[int], seconds: float, now: float = 0.0) -> float:
        """Learn how long a batch took that ended `now`; returns that as a ratio of what was expected.

        Without a clock, no time passes.
        """
        self.age(now)
        self.learned_at = now
        ratio = seconds / self.of_batch(levels)
        missed = seconds > self.of_batch(levels, promised=True)
        if missed:
            self._broken_at, self._kept_in_a_row = now, 0
            log_margin = self._log_margin + _MARGIN_RATE * (1 - _MISSES)
        else:
            self._kept_in_a_row += 1
            log_margin = self._log_margin - _MARGIN_RATE * _MISSES * max(1.0, self._kept_in_a_row / _LONG_ROW)
        self._log_margin = min(max(log_margin, self._least_margin), _MARGIN_MOST)
        size = len(levels)
        cell = (size, levels[0] if levels.count(levels[0]) == size else -1)
        self._correct(cell, ratio, now)
        self._recent.append(math.log(ratio * self._drift))
        self._recent_cells.append(cell)
        self._weigh()
        return ratio

    @property
    def observed(self) -> bool:
        """Whether enough batches were observed for predictions to follow them."""
        return None not in self._recent_cells

    @property
    def settled(self) -> bool:
        """Whether enough batches were observed, and predictions are at most slightly above the profile.

        If not, an idle device should run probes: predictions that are too high refuse the requests that would correct
        them.
        """
        if not self.observed:
            return False
        top = self.levels - 1
        measured = self._measured[1][top] * self._spread[1][top]
        return self.promised(1, top) <= (1 + _DOUBTED) * measured

    def age(self, now: float) -> bool:
        """Forget slowness that has become stale; return whether there was time to look for it.

        It keeps promises too long where no batch corrects them: on an idle server, in batches of a kind that isn't run,
        and for a model without requests while others have some.
        """
        since = self._aged_at
        if now - since < _AGE_EVERY:
            return False
        self._aged_at = now
        kept = _kept(_STALE_DRIFT, self.learned_at, since, now)
        if kept < 1:
            self._recent.extend([min(log, log * kept) for log in self._recent])
        self._log_margin = min(self._log_margin, self._log_margin * _kept(_STALE, self._broken_at, since, now))
        for cell, at in self._corrected.items():
            if (kept := _kept(_STALE, at, since, now)) < 1:
                self._set_cell(cell, min(self._cells[cell], self._cells[cell] * kept))
        self._weigh()
        return True

    def forget_slowness(self, seconds: float) -> None:
        """Forget by how much batches were slower than the profile, by half for each half second.

        For times in which no batch ran because none was expected to be in time, so that none could show that the
        machine has recovered. By how much batches were faster is kept, since the requests it admits correct it.
        """
        kept = 0.5 ** (seconds / _HALF_LIFE)
        self._recent.extend([min(log, log * kept) for log in self._recent])
        self._log_margin = min(self._log_margin, self._log_margin * kept)
        for cell, log in self._cells.items():
            self._set_cell(cell, min(log, log * kept))
        self._weigh()

    def _correct(self, cell: tuple[int, int], ratio: float, now: float) -> None:
        """Correct a cell that differs from the profile while other recent cells don't."""
        if cell[1] < 0 or sum(other not in (cell, None) for other in self._recent_cells) <= _RECENT // 2:
            return  # with too few other cells, drift comes from this very cell, and already explains the difference
        # A step of fixed length towards the observation follows the median, which ignores stalls as the mean doesn't.
        log = (1 - _CELL_LEAK) * self._cells.get(cell, 0.0) + math.copysign(_CELL_STEP, ratio - 1)
        self._corrected[cell] = now
        self._set_cell(cell, min(max(log, -_CELL_MOST), _CELL_MOST))

    def _set_cell(self, cell: tuple[int, int], log: float) -> None:
        size, level = cell
        self._cells[cell] = log
        self._median[size][level] = self._measured[size][level] * math.exp(log)

    def _weigh(self) -> None:
        ranked = sorted(self._recent)
        self._drift = math.exp(ranked[_RECENT // 2])
        self._worst = math.exp(ranked[-2])
        self._margin = math.exp(self._log_margin)


def _kept(stale: float, at: float, since: float, now: float) -> float:
    """Return the share that is kept of a figure learned `at`, of what was left of it `since`."""
    return math.pow(0.5, max(0.0, now - max(since, at + stale)) / stale)
