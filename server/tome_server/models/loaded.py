"""A model together with its network, as the process that has the device holds it."""

from collections.abc import Mapping
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from tome_server.merging import MergedModel, macs
from tome_server.merging.schedule import mergeable
from tome_server.models.hosted import HostedModel, Quality
from tome_server.models.preprocess import Preprocess


@dataclass(frozen=True, kw_only=True)
class LoadedModel(HostedModel):
    """A hosted model that can run."""

    merged: MergedModel

    def input(self, images: Tensor, device: torch.device) -> Tensor:
        """Return images, [B, C, H, W], on the device and in the dtype of the network."""
        return images.to(device, getattr(torch, self.dtype))

    @property
    def described(self) -> HostedModel:
        """The same without the network, to be sent to another process."""
        return HostedModel(**{part.name: getattr(self, part.name) for part in fields(HostedModel)})


def loaded_model(
    merged: MergedModel,
    preprocess: Preprocess,
    *,
    name: str,
    architecture: str,
    dtype: str = "float32",
    weights_bytes: int = 0,
    description: str = "",
    labels: tuple[str, ...] = (),
    default_budget: float | None = None,
    quality: Mapping[int, Quality] | None = None,
) -> LoadedModel:
    """Return a model with what is to know about its network, counted from its shapes."""
    _, height, width = preprocess.settings.input_size
    rows, columns = merged.grid(height, width)
    largest_r = mergeable(rows * columns + merged.prefix, merged.prefix)
    return LoadedModel(
        name=name,
        architecture=architecture,
        description=description,
        preprocess=preprocess,
        labels=labels,
        num_classes=int(merged.model.num_classes),
        feature_dim=int(merged.model.num_features),
        patch_grid=(rows, columns),
        costs=tuple(macs(merged.model, r, (height, width)) for r in range(largest_r + 1)),
        dtype=dtype,
        weights_bytes=weights_bytes,
        default_budget=default_budget,
        quality=dict(quality or {}),
        merged=merged,
    )
