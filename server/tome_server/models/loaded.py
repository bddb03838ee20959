"""A model together with its network, as the process that has the device holds it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Protocol

import torch
from torch import Tensor

from tome_server.mac_count import MacCount
from tome_server.merging import MergedModel, MergedOutput, Schedule, macs, tokens_per_block
from tome_server.merging.schedule import mergeable
from tome_server.models.hosted import HostedModel, Quality, r_grid
from tome_server.models.preprocess import Preprocess
from tome_server.models.transform import ImageSettings


class Forward(Protocol):
    """Runs images [B, C, H, W], on the device and in the dtype of the network, at one r or each at its own."""

    def __call__(
        self, images: Tensor, r: int | Sequence[int] = 0, *, return_tokens: bool = False, return_token_map: bool = False
    ) -> MergedOutput:
        """As MergedModel's forward."""


@dataclass(frozen=True, kw_only=True)
class LoadedModel(HostedModel):
    """A hosted model that can run."""

    merged: MergedModel
    division_gain: float | None = None
    """How many times as fast a single image is on all CPU threads as on one, where `division` was chosen by that."""
    graphs: Forward | None = None
    """What was recorded of it, to be run in its place: see execution/cuda_graphs.py."""

    def input(self, images: Tensor, device: torch.device) -> Tensor:
        """Return `images` [B, C, H, W] on the device and in the dtype of the network, normalised if they are uint8.

        Copies from pinned memory are not waited for.
        """
        images = images.to(device, non_blocking=True)
        if images.dtype == torch.uint8:
            images = normalise(images, self.preprocess.settings)
        return images.to(getattr(torch, self.dtype))

    def run(
        self, images: Tensor, r: int | Sequence[int] = 0, *, return_tokens: bool = False, return_token_map: bool = False
    ) -> MergedOutput:
        """As MergedModel's forward: `images` at one r or each at its own, merged in the blocks as `schedules` say."""
        if self.graphs is not None:
            return self.graphs(images, r, return_tokens=return_tokens, return_token_map=return_token_map)
        how = self.schedule(r) if isinstance(r, int) else [self.schedule(own) for own in r]
        output: MergedOutput = self.merged(images, how, return_tokens=return_tokens, return_token_map=return_token_map)
        return output

    def schedule(self, r: int) -> Schedule:
        """Return how many tokens each block merges at `r`."""
        tuned = self.schedules.get(r)
        return Schedule.constant(r) if tuned is None else Schedule.explicit(tuned)

    def count(self, schedule: int | Schedule) -> MacCount:
        """Return the multiply-accumulates of one image merged by a schedule, be it the model's own or not."""
        _, height, width = self.preprocess.settings.input_size
        return macs(self.merged.model, schedule, (height, width), checked=True)

    @property
    def described(self) -> HostedModel:
        """The same without the network, to be sent to another process."""
        return HostedModel(**{part.name: getattr(self, part.name) for part in fields(HostedModel)})


def normalise(images: Tensor, settings: ImageSettings) -> Tensor:
    """Return uint8 `images` [B, C, H, W] as shares of 255, less the mean and divided by the deviation, in float32.

    On the CPU to the last bit what timm's transform gives; CUDA multiplies by reciprocals, which can round otherwise.
    """
    values = images.float().div_(255)
    # By numbers and not by tensors of them, which would have to be on the device first.
    for channel, (mean, std) in enumerate(zip(settings.mean, settings.std, strict=True)):
        values[:, channel].sub_(mean).div_(std)
    return values


def loaded_model(
    merged: MergedModel,
    preprocess: Preprocess,
    *,
    name: str,
    architecture: str,
    dtype: str = "float32",
    weights_bytes: int = 0,
    version: int = 1,
    description: str = "",
    labels: tuple[str, ...] = (),
    default_budget: float | None = None,
    quality: Mapping[int, Quality] | None = None,
    division_gain: float | None = None,
) -> LoadedModel:
    """Return a model with what is to know about its network, counted from its shapes."""
    _, height, width = preprocess.settings.input_size
    rows, columns = merged.grid(height, width)
    largest_r = mergeable(rows * columns + merged.prefix, merged.prefix)
    costs = tuple(macs(merged.model, r, (height, width)) for r in range(largest_r + 1))
    return LoadedModel(
        name=name,
        architecture=architecture,
        version=version,
        description=description,
        preprocess=preprocess,
        labels=labels,
        num_classes=int(merged.model.num_classes),
        feature_dim=int(merged.model.num_features),
        patch_grid=(rows, columns),
        costs=costs,
        rs=r_grid(costs),
        dtype=dtype,
        division=merged.division,
        weights_bytes=weights_bytes,
        default_budget=default_budget,
        quality=dict(quality or {}),
        merged=merged,
        division_gain=division_gain,
    )


def with_schedules(model: LoadedModel, schedules: Mapping[int, Sequence[int]]) -> LoadedModel:
    """Return a model whose blocks merge at some r what `schedules` say of them, by r, and not r each.

    Raises ValueError, or TypeError, if one isn't for this model, or takes more work than r tokens merged in every
    block, or less than r + 1.
    """
    tuned = {r: tuple(per_block) for r, per_block in schedules.items()}
    costs = list(model.costs)
    for r, per_block in tuned.items():
        if not 0 < r <= model.largest_r:
            raise ValueError(f"a schedule is for an r of 1 to {model.largest_r}, not {r}")
        schedule = Schedule.explicit(per_block)
        _check_mergeable(r, schedule.per_block(model.merged.depth), model)
        costs[r] = model.count(schedule)
        least = model.count(r + 1).total if r < model.largest_r else 0
        most = model.count(r).total
        if not least <= costs[r].total <= most:
            raise ValueError(
                f"the schedule of r = {r} takes {costs[r].total:,} multiply-accumulates, not {least:,} to {most:,}: "
                f"what {r + 1} and {r} tokens merged in every block take"
            )
    return replace(model, costs=tuple(costs), schedules=tuned)


def _check_mergeable(r: int, per_block: Sequence[int], model: LoadedModel) -> None:
    rows, columns = model.patch_grid
    prefix = model.merged.prefix
    counts = (rows * columns + prefix, *tokens_per_block(rows * columns, prefix, per_block))
    for block, wanted in enumerate(per_block):
        if counts[block] - counts[block + 1] < wanted:
            raise ValueError(f"the schedule of r = {r} can't merge {wanted} of {counts[block]} tokens in block {block}")
