"""Finds schedules that change a model's answers at r = 0 less than r in every block does.

A schedule is judged by the probability that it shifts from one class to another: the total variation distance of the
class probabilities from those at r = 0. Unlike agreement, it isn't decided by the few images whose class changes; and
it is bounded, so that single images don't decide it. All results are reported on images that weren't used in the
search, since the best of many schedules is partly the best by chance on the images that it was chosen by.
"""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from tome_server.calibration.datasets import Dataset
from tome_server.calibration.evaluation import class_ids_of
from tome_server.calibration.schedule_search import PerBlock, SearchSpace, search
from tome_server.errors import ConfigError, DatasetError
from tome_server.mac_count import MacCount
from tome_server.merging import Schedule
from tome_server.models.loaded import LoadedModel

# Images that a candidate runs before it is compared with the best one, and dropped if it is clearly worse.
CHUNK = 64
BATCH = 32
# A difference counts from this many standard errors on. One in forty schedules that are no better reaches it by chance.
_ERRORS = 2
# On fewer images, the standard error is too uncertain.
LEAST_HELD_OUT = 30


@dataclass(frozen=True)
class Kept:
    """How much of a model's answers at r = 0 is kept, on images that weren't used in the search."""

    shifted: float
    """Mean probability that is shifted from one class to another."""
    agreement: float
    """Share of images classified as at r = 0."""
    top1: float | None
    """Share of images classified as labelled; None if they have no labels."""


@dataclass(frozen=True)
class Tuned:
    """The best schedule found for one r, and how it compares with r in every block."""

    r: int
    schedule: PerBlock
    macs: int
    constant_macs: int
    tuned: Kept
    constant: Kept
    difference: float
    """`shifted` of the schedule minus that of r in every block."""
    standard_error: float
    """Of the difference, from image to image."""

    @property
    def better(self) -> bool:
        """Whether the schedule shifts less than r in every block, by more than is likely by chance."""
        return self.difference < 0 and self.difference <= -_ERRORS * self.standard_error

    def fields(self) -> dict[str, Any]:
        """Return the fields of its JSON."""
        return asdict(self) | {"kept": self.better}


def divide(images: Dataset, limit: int | None, held_out: int | None, seed: int) -> tuple[Dataset, Dataset]:
    """Divide images at random into those to search on and those to measure on.

    Args:
        images: All images.
        limit: How many of them to use; None for all.
        held_out: How many of these to measure on; None for half.
        seed: What the random choice depends on.

    Returns:
        The images to search on, and the images to measure on.

    Raises:
        DatasetError: If either part has too few images.
    """
    count = len(images) if limit is None else min(limit, len(images))
    measured = (count + 1) // 2 if held_out is None else held_out
    if measured < LEAST_HELD_OUT:
        raise DatasetError(
            f"{measured} images to measure on are too few to tell a gain from chance: it takes {LEAST_HELD_OUT}, "
            "beside those that are searched on"
        )
    if measured >= count:
        raise DatasetError(f"{measured} to measure on, of {count}, leave none to search on")
    chosen = np.random.default_rng(seed).permutation(len(images))[:count].tolist()
    return images.subset(sorted(chosen[: count - measured])), images.subset(sorted(chosen[count - measured :]))


@torch.inference_mode()
def tune(
    model: LoadedModel,
    searched: Dataset,
    held_out: Dataset,
    rs: Sequence[int],
    device: torch.device,
    *,
    blocks: int | None = None,
    trials: int = 48,
    seed: int = 0,
    progress: bool = False,
) -> list[Tuned]:
    """Search for a schedule for each of `rs` on some images, and compare it with r in every block on others.

    The same arguments give the same schedules on the same machine.

    Args:
        model: The model, on `device`.
        searched: The images to search on.
        held_out: The images to measure on.
        rs: The r values to find schedules for.
        device: Where the model runs.
        blocks: The most blocks that a schedule may merge in; None for a third of all.
        trials: How many schedules to run for the largest r. Each other r gets half as many, and starts from the
            schedule of the r before it.
        seed: What the search depends on.
        progress: Whether to show a progress bar.

    Returns:
        The best schedules in descending order of r. An r for which no schedule can be made is left out.

    Raises:
        ConfigError: If the model has no classifier, or `blocks` or an r is out of range.
        DatasetError: If the labels don't fit the model, or an image can't be decoded.
    """
    if not model.info.num_classes:
        raise ConfigError(f"{model.info.name} has no classifier to tune by; tome-server models fit-head gives it one")
    depth = model.merged.depth
    merging = max(1, round(depth / 3)) if blocks is None else blocks
    if not 1 <= merging <= depth:
        raise ConfigError(f"{model.info.name} has {depth} blocks, of which {merging} can't merge")
    for r in rs:
        if not 0 < r <= model.info.largest_r:
            raise ConfigError(f"r must lie in 1..{model.info.largest_r} for {model.info.name}, and is {r}")
    class_ids_of(model.info, held_out)  # raises before the search if the labels don't fit
    prepared = _prepared(model, searched)
    plain = torch.cat([_probabilities(model, part, 0, device) for part in torch.split(prepared, BATCH)])
    best: dict[int, PerBlock] = {}
    before: PerBlock | None = None
    wanted = sorted(set(rs), reverse=True)
    steps = [trials if i == 0 else max(1, trials // 2) for i in range(len(wanted))]
    with tqdm(total=sum(steps), unit="schedule", disable=not progress) as bar:
        for r, step in zip(wanted, steps, strict=True):
            bar.set_description(f"r = {r}")
            least = model.count(r + 1).total if r < model.info.largest_r else 0
            race = _Race(model, prepared, plain, device, least, bar.update)
            search(_space(model, r), race, blocks=merging, trials=step, seed=seed + r, start=before)
            if race.best is not None:
                best[r] = before = race.best
    return _compared(model, held_out, best, device, progress)


def _space(model: LoadedModel, r: int) -> SearchSpace:
    """Return the schedules that take no more work than r in every block, both as it is counted and as it is done.

    The two differ if the head reads only the class token: the last block then computes only that, however many tokens
    it would merge. There is nothing to search in that block, which goes on merging r.
    """
    rows, columns = model.info.patch_grid
    constant = model.count(r)
    depth = model.merged.depth
    searched = depth - 1 if constant.unread else depth

    def fits(per_block: PerBlock) -> bool:
        cost = model.count(Schedule.explicit(per_block))
        return cost.total <= constant.total and _done(cost) <= _done(constant)

    return SearchSpace(
        patches=rows * columns, prefix=model.merged.prefix, free=searched, rest=(r,) * (depth - searched), fits=fits
    )


def _done(cost: MacCount) -> int:
    """Return the part of the counted multiply-accumulates that is really computed."""
    return cost.total - cost.unread


class _Race:
    """Runs schedules on images in chunks, and drops those that fall behind the best one."""

    def __init__(
        self,
        model: LoadedModel,
        images: Tensor,
        plain: Tensor,
        device: torch.device,
        least: int,
        progress: Callable[[], object],
    ) -> None:
        """A schedule of fewer multiply-accumulates than `least` is useless: it would belong to a greater r.

        `plain` are the probabilities at r = 0 [B, classes]; `progress` is called for each schedule.
        """
        self.best: PerBlock | None = None
        self._shifted: Tensor | None = None
        self._model, self._images, self._plain, self._device, self._progress = model, images, plain, device, progress
        self._least = least

    def __call__(self, per_block: PerBlock) -> bool:
        """Return whether a schedule shifts less than all before it."""
        self._progress()
        schedule = Schedule.explicit(per_block)
        if self._model.count(schedule).total < self._least:
            return False
        shifted = torch.empty(0)
        for images in torch.split(self._images, CHUNK):
            given = torch.cat(
                [_probabilities(self._model, part, schedule, self._device) for part in torch.split(images, BATCH)]
            )
            so_far = len(shifted)
            shifted = torch.cat([shifted, _shift(given, self._plain[so_far : so_far + len(given)])])
            if self._shifted is not None and len(shifted) > 1:
                worse = shifted - self._shifted[: len(shifted)]
                if worse.mean() > worse.std() / len(worse) ** 0.5:
                    return False
        if self._shifted is not None and shifted.mean() >= self._shifted.mean():
            return False
        self.best, self._shifted = per_block, shifted
        return True


def _compared(
    model: LoadedModel, images: Dataset, schedules: dict[int, PerBlock], device: torch.device, progress: bool
) -> list[Tuned]:
    """Measure schedules and, for comparison, r in every block."""
    # By r, and 1 for its schedule or 0 for r in every block.
    compared = {(r, tuned): Schedule.explicit(own) if tuned else r for r, own in schedules.items() for tuned in (0, 1)}
    shifted: dict[tuple[int, int], list[Tensor]] = {one: [] for one in compared}
    agreeing, right = dict.fromkeys(compared, 0), dict.fromkeys(compared, 0)
    class_ids = class_ids_of(model.info, images)
    with tqdm(total=len(images), desc="held out", unit="image", disable=not progress) as bar:
        for start in range(0, len(images), BATCH):
            part = images.subset(range(start, min(start + BATCH, len(images))))
            inputs = _prepared(model, part)
            labels = torch.tensor([class_ids[label] for label in part.labels or ()])
            plain = _probabilities(model, inputs, 0, device)
            for one, schedule in compared.items():
                given = _probabilities(model, inputs, schedule, device)
                shifted[one].append(_shift(given, plain))
                classes = given.argmax(dim=1)
                agreeing[one] += int((classes == plain.argmax(dim=1)).sum())
                right[one] += int((classes == labels).sum()) if len(labels) else 0
            bar.update(len(part))
    found = []
    for r, own in schedules.items():
        constant, tuned = (torch.cat(shifted[r, each]) for each in (0, 1))
        kept = [
            Kept(
                shifted=float(values.mean()),
                agreement=agreeing[r, each] / len(images),
                top1=right[r, each] / len(images) if images.labels is not None else None,
            )
            for each, values in enumerate((constant, tuned))
        ]
        difference = tuned - constant
        error = float(difference.std()) / len(images) ** 0.5 if len(images) > 1 else 0.0
        macs, constant_macs = (model.count(schedule).total for schedule in (Schedule.explicit(own), r))
        found.append(Tuned(r, own, macs, constant_macs, kept[1], kept[0], float(difference.mean()), error))
    return found


def _prepared(model: LoadedModel, images: Dataset) -> Tensor:
    with ThreadPoolExecutor() as decoders:
        return torch.from_numpy(
            np.stack(list(decoders.map(model.info.preprocess.image, (image for image, _ in images))))
        )


def _probabilities(model: LoadedModel, images: Tensor, schedule: int | Schedule, device: torch.device) -> Tensor:
    logits = model.merged(model.input(images, device), schedule).logits
    return torch.softmax(logits.float(), dim=1).cpu()


def _shift(given: Tensor, plain: Tensor) -> Tensor:
    """Return, for each image, the probability that is shifted to other classes: [B]."""
    return (given - plain).abs().sum(dim=1) / 2
