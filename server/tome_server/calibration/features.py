"""Computes the features that a new head is fitted to: the model's output before its classifier."""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from tome_server.calibration.datasets import Dataset
from tome_server.models.loaded import LoadedModel


@torch.inference_mode()
def pooled_features(
    model: LoadedModel,
    images: Dataset,
    rs: Sequence[int],
    device: torch.device,
    *,
    batch: int = 32,
    progress: bool = False,
) -> Tensor:
    """Return the input of the classifier for each image at each r of `rs`: [r, images, D] float32, on the CPU.

    Raises DatasetError if an image can't be decoded.
    """
    parts: list[Tensor] = []
    with ThreadPoolExecutor() as decoders, tqdm(total=len(images), unit="image", disable=not progress) as bar:
        for start in range(0, len(images), batch):
            chosen = [images[i][0] for i in range(start, min(start + batch, len(images)))]
            prepared = np.stack(list(decoders.map(model.info.preprocess.image, chosen)))
            inputs = model.input(torch.from_numpy(prepared), device)
            parts.append(torch.stack([model.run(inputs, r).features.float().cpu() for r in rs]))
            bar.update(len(chosen))
    return torch.cat(parts, dim=1)
