"""What is known about a loaded model without its network: input, labels, and what each r costs and is worth."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from tome_server.mac_count import MacCount
from tome_server.models.preprocess import Preprocess

# With less than about half of the work left, accuracy drops steeply (ToMe, figure 3). r = 16 on ViT-B/16 leaves 49.9 %.
LEAST_WORK = 0.49
GRID_STEPS = 8
# Top-1 of ViT-B/16 (AugReg) at r = 0, 2, … 16, and the share of its multiply-accumulates left at each (ToMe, appendix).
# Policies assume them for a model whose own quality was never measured.
_PUBLISHED_WORK = (1.0, 0.936, 0.873, 0.809, 0.746, 0.684, 0.621, 0.560, 0.499)
_PUBLISHED_TOP1 = (84.57, 84.52, 84.39, 84.17, 83.94, 83.37, 82.86, 82.04, 80.38)


@dataclass(frozen=True)
class Quality:
    """The quality measured at one r, as shares of the images evaluated."""

    agreement: float
    """Images classified as at r = 0."""
    top1: float | None = None
    """Images classified as labelled; None if they have no labels."""


@dataclass(frozen=True)
class MergeLevel:
    """One r of a model's grid."""

    r: int
    cost: MacCount
    quality: Quality | None


@dataclass(frozen=True, kw_only=True)
class ModelInfo:
    """All that the server knows about a loaded model. Immutable: threads may share it, and it can be pickled."""

    name: str
    architecture: str
    version: int = 1
    """1 for a model without versions."""
    description: str = ""
    preprocess: Preprocess
    labels: tuple[str, ...] = ()
    """One for each class, or none at all."""
    num_classes: int
    """Length of the scores."""
    feature_dim: int
    """Length of the features."""
    patch_grid: tuple[int, int]
    """Rows and columns of patches."""
    costs: tuple[MacCount, ...] = field(repr=False)
    """Multiply-accumulates of one image at each r, from 0 to the largest."""
    rs: tuple[int, ...]
    """The r grid: the values of r that the model is served at."""
    schedules: dict[int, tuple[int, ...]] = field(default_factory=dict)
    """By r, the tokens that each block merges, for those r where that isn't r in every block. It takes no more work."""
    dtype: str = "float32"
    """Of weights and activations."""
    division: str = ""
    """What a few CPU threads divide among themselves; empty on one thread, on many, and on a GPU."""
    weights_bytes: int = 0
    """Memory that the weights take."""
    default_budget: float | None = None
    """Latency budget, in seconds, of requests that set none; None derives it from the model's latency."""
    quality: dict[int, Quality] = field(default_factory=dict)
    """By r, where it was measured."""

    @property
    def largest_r(self) -> int:
        """The most tokens that a block can merge: half of the patches."""
        return len(self.costs) - 1

    def cost(self, r: int) -> MacCount:
        """Return the multiply-accumulates of one image at `r`."""
        return self.costs[r]

    @cached_property
    def grid(self) -> tuple[MergeLevel, ...]:
        """The r values that the model is served at, each with its cost and quality."""
        return tuple(MergeLevel(r, self.cost(r), self.quality.get(r)) for r in self.rs)

    @cached_property
    def relative_quality(self) -> tuple[float, ...] | None:
        """By level of the grid, the measured quality as a share of that at r = 0; None unless all levels were measured.

        Quality is top-1 if the images were labelled, else agreement with r = 0.
        """
        measured = [level.quality for level in self.grid]
        if any(quality is None for quality in measured):
            return None
        labelled = all(quality.top1 is not None for quality in measured if quality)
        values = [(quality.top1 if labelled else quality.agreement) or 0.0 for quality in measured if quality]
        return tuple(value / values[0] for value in values) if values[0] > 0 else None

    @cached_property
    def assumed_quality(self) -> tuple[float, ...]:
        """By level of the grid, the quality that policies assume: the relative one, or if unmeasured, ViT-B/16's.

        ViT-B/16's is taken at the same share of multiply-accumulates.
        """
        if self.relative_quality is not None and min(self.relative_quality) > 0:
            return self.relative_quality
        work = [level.cost.total / self.cost(0).total for level in self.grid]
        falling = [-share for share in _PUBLISHED_WORK]
        return tuple(float(np.interp(-share, falling, _PUBLISHED_TOP1)) / _PUBLISHED_TOP1[0] for share in work)


def r_grid(costs: Sequence[MacCount]) -> tuple[int, ...]:
    """Return the r values to serve a model at, evenly spaced from 0 to where about half of the work is left.

    `costs` are of one image with r tokens merged in every block, from r = 0.
    """
    last = max(r for r, cost in enumerate(costs) if cost.merged >= LEAST_WORK * cost.dense)
    return tuple(range(0, last + 1, max(1, math.ceil(last / GRID_STEPS))))
