"""A model as it is served: network, input, labels, and what each r costs and is worth."""

import math
from dataclasses import dataclass, field
from functools import cached_property

from tome_server.merging import MacCount, MergedModel, macs
from tome_server.merging.schedule import mergeable
from tome_server.models.preprocess import Preprocess

# Past about half of the work accuracy falls off a cliff (ToMe, figure 3). 16 on ViT-B/16 leaves 49.9 %.
LEAST_WORK = 0.49
GRID_STEPS = 8


@dataclass(frozen=True)
class Quality:
    """What one r was measured to be worth, as shares of the images evaluated."""

    agreement: float
    """Images given the same class as at r = 0."""
    top1: float | None = None
    """Images given their label; None where they have none."""


@dataclass(frozen=True)
class MergeLevel:
    """One r of a model's grid."""

    r: int
    cost: MacCount
    quality: Quality | None


@dataclass(frozen=True)
class HostedModel:
    """A loaded model. Immutable: threads may share it."""

    name: str
    architecture: str
    description: str
    merged: MergedModel
    preprocess: Preprocess
    labels: tuple[str, ...]
    """One a class, or none."""
    default_r: int
    quality: dict[int, Quality] = field(default_factory=dict)
    """By r, where it was measured."""
    _costs: dict[int, MacCount] = field(default_factory=dict, repr=False, compare=False)

    @property
    def num_classes(self) -> int:
        """Length of the scores."""
        return int(self.merged.model.num_classes)

    @property
    def feature_dim(self) -> int:
        """Length of the features."""
        return int(self.merged.model.num_features)

    @cached_property
    def patch_grid(self) -> tuple[int, int]:
        """Patches from top to bottom and from left to right."""
        _, height, width = self.preprocess.settings.input_size
        return self.merged.grid(height, width)

    @cached_property
    def largest_r(self) -> int:
        """The most tokens that a block can merge: half of the patches."""
        rows, columns = self.patch_grid
        return mergeable(rows * columns + self.merged.prefix, self.merged.prefix)

    def cost(self, r: int) -> MacCount:
        """Count the multiply-accumulates of one image at `r`."""
        if r not in self._costs:
            _, height, width = self.preprocess.settings.input_size
            self._costs[r] = macs(self.merged.model, r, (height, width))
        return self._costs[r]

    @cached_property
    def grid(self) -> tuple[MergeLevel, ...]:
        """The r values that the model is served at, evenly from 0 to where about half of the work is left."""
        last = max(r for r in range(self.largest_r + 1) if self.cost(r).merged >= LEAST_WORK * self.cost(0).dense)
        step = max(1, math.ceil(last / GRID_STEPS))
        return tuple(MergeLevel(r, self.cost(r), self.quality.get(r)) for r in range(0, last + 1, step))
