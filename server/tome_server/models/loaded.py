"""A model with its network, as the process that owns the device holds it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from tome_server.mac_count import MacCount
from tome_server.merging import MergedModel, MergedOutput, Schedule, macs, tokens_per_block
from tome_server.merging.schedule import mergeable
from tome_server.models.model_info import ModelInfo, r_grid
from tome_server.models.preprocess import Preprocess
from tome_server.models.transform import ImageSettings


class Forward(Protocol):
    """Runs images [B, C, H, W], on the device and in the dtype of the network, at one r or each at its own."""

    def __call__(
        self, images: Tensor, r: int | Sequence[int] = 0, *, return_tokens: bool = False, return_token_map: bool = False
    ) -> MergedOutput:
        """Return what `MergedModel.forward` returns for these arguments."""


@dataclass(frozen=True, kw_only=True)
class LoadedModel:
    """A model that can run."""

    info: ModelInfo
    merged: MergedModel
    division_gain: float | None = None
    """How many times as fast a single image is on all CPU threads as on one, if `info.division` was chosen by that."""
    graphs: Forward | None = None
    """CUDA graphs that are run in place of `merged` where one was recorded: see execution/cuda_graphs.py."""

    def input(self, images: Tensor, device: torch.device) -> Tensor:
        """Return `images` [B, C, H, W] on the device and in the dtype of the network, normalised if they are uint8.

        Copies from pinned memory are not waited for.
        """
        images = images.to(device, non_blocking=True)
        if images.dtype == torch.uint8:
            images = normalise(images, self.info.preprocess.settings)
        return images.to(getattr(torch, self.info.dtype))

    def run(
        self, images: Tensor, r: int | Sequence[int] = 0, *, return_tokens: bool = False, return_token_map: bool = False
    ) -> MergedOutput:
        """Run `images` [B, C, H, W] at one r or each at its own, merged in the blocks as `info.schedules` say.

        They must be on the device and in the dtype of the network, as `input` returns them.
        """
        if self.graphs is not None:
            return self.graphs(images, r, return_tokens=return_tokens, return_token_map=return_token_map)
        schedules = self.schedule(r) if isinstance(r, int) else [self.schedule(each) for each in r]
        output: MergedOutput = self.merged(
            images, schedules, return_tokens=return_tokens, return_token_map=return_token_map
        )
        return output

    def schedule(self, r: int) -> Schedule:
        """Return how many tokens each block merges at `r`."""
        tuned = self.info.schedules.get(r)
        return Schedule.constant(r) if tuned is None else Schedule.explicit(tuned)

    def count(self, schedule: int | Schedule) -> MacCount:
        """Return the multiply-accumulates of one image merged by a schedule, whether or not it is the model's own."""
        _, height, width = self.info.preprocess.settings.input_size
        return macs(self.merged.model, schedule, (height, width), checked=True)


def normalise(images: Tensor, settings: ImageSettings) -> Tensor:
    """Return uint8 `images` [B, C, H, W] divided by 255, less the mean and divided by the deviation, in float32.

    On a CPU, each value is the one that timm's transform gives, bit for bit; CUDA multiplies by reciprocals, which may
    round differently.
    """
    values = images.float().div_(255)
    # Channel by channel with numbers, for tensors of them would have to be copied to the device first.
    for channel, (mean, std) in enumerate(zip(settings.mean, settings.std, strict=True)):
        values[:, channel].sub_(mean).div_(std)
    return values


def loaded_model(merged: MergedModel, preprocess: Preprocess, *, name: str, architecture: str) -> LoadedModel:
    """Return a model of a network. Only what follows from the network is in `info`; the rest is at its defaults."""
    _, height, width = preprocess.settings.input_size
    rows, columns = merged.grid(height, width)
    largest_r = mergeable(rows * columns + merged.prefix, merged.prefix)
    costs = tuple(macs(merged.model, r, (height, width)) for r in range(largest_r + 1))
    info = ModelInfo(
        name=name,
        architecture=architecture,
        preprocess=preprocess,
        num_classes=int(merged.model.num_classes),
        feature_dim=int(merged.model.num_features),
        patch_grid=(rows, columns),
        costs=costs,
        rs=r_grid(costs),
        dtype=str(next(merged.parameters()).dtype).removeprefix("torch."),
        division=merged.division,
    )
    return LoadedModel(info=info, merged=merged)


def with_schedules(model: LoadedModel, schedules: Mapping[int, Sequence[int]]) -> LoadedModel:
    """Return a model that merges by `schedules`: for some r, the tokens to merge in each block.

    Raises ValueError or TypeError if a schedule isn't for this model, if it takes more work than r tokens merged in
    every block, or less than r + 1.
    """
    tuned, info = {r: tuple(per_block) for r, per_block in schedules.items()}, model.info
    costs = list(info.costs)
    for r, per_block in tuned.items():
        if not 0 < r <= info.largest_r:
            raise ValueError(f"a schedule is for an r of 1 to {info.largest_r}, not {r}")
        schedule = Schedule.explicit(per_block)
        _check_mergeable(r, schedule.per_block(model.merged.depth), model)
        costs[r] = model.count(schedule)
        least = model.count(r + 1).total if r < info.largest_r else 0
        most = model.count(r).total
        if not least <= costs[r].total <= most:
            raise ValueError(
                f"the schedule of r = {r} takes {costs[r].total:,} multiply-accumulates, not {least:,} to {most:,}: "
                f"what {r + 1} and {r} tokens merged in every block take"
            )
    return replace(model, info=replace(info, costs=tuple(costs), schedules=tuned))


def _check_mergeable(r: int, per_block: Sequence[int], model: LoadedModel) -> None:
    rows, columns = model.info.patch_grid
    prefix = model.merged.prefix
    counts = (rows * columns + prefix, *tokens_per_block(rows * columns, prefix, per_block))
    for block, wanted in enumerate(per_block):
        if counts[block] - counts[block + 1] < wanted:
            raise ValueError(f"the schedule of r = {r} can't merge {wanted} of {counts[block]} tokens in block {block}")
