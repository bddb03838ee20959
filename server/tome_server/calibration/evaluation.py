"""Measures the quality at each r: top-1 on labelled images, and agreement with r = 0 on any images."""

import importlib.metadata
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from tome_server.calibration.datasets import Dataset
from tome_server.errors import ConfigError, DatasetError
from tome_server.models.loaded import LoadedModel
from tome_server.models.model_info import ModelInfo, Quality
from tome_server.models.spec import ModelSpec, weights_digest


@torch.inference_mode()
def evaluate(
    model: LoadedModel,
    images: Dataset,
    grid: Sequence[int],
    device: torch.device,
    *,
    reference: LoadedModel | None = None,
    batch: int = 64,
    limit: int | None = None,
    progress: bool = False,
) -> dict[int, Quality]:
    """Classify images at r = 0 and at every r of a grid, and return the quality at each, in ascending order of r.

    The classes of a folder are matched to the model's labels by name; other labels are class numbers.

    Args:
        model: The model, on `device`.
        images: The images, with or without labels.
        grid: The r values. One beyond the model's largest is lowered to that, as in merging.
        device: Where the model runs.
        reference: The same model in float32, to whose classes at r = 0 agreement refers; None for the model itself.
        batch: Images that are run at a time.
        limit: How many of the images to use, from the first; None for all.
        progress: Whether to show a progress bar.

    Raises:
        DatasetError: If the labels don't fit the model, or an image can't be decoded.
        ConfigError: If the model has no classifier.
    """
    if not model.info.num_classes:
        raise ConfigError(f"{model.info.name} has no classifier to measure; tome-server models fit-head gives it one")
    levels = sorted({0, *(min(r, model.info.largest_r) for r in grid)})
    count = len(images) if limit is None else min(limit, len(images))
    class_ids = class_ids_of(model.info, images)
    agreeing: Counter[int] = Counter()
    right: Counter[int] = Counter()
    labelled = images[0][1] is not None
    with ThreadPoolExecutor() as decoders, tqdm(total=count, unit="image", disable=not progress) as bar:
        for start in range(0, count, batch):
            chosen = [images[i] for i in range(start, min(start + batch, count))]
            prepared = decoders.map(model.info.preprocess.image, [image for image, _ in chosen])
            inputs = torch.from_numpy(np.stack(list(prepared)))
            wanted = torch.tensor([-1 if label is None else class_ids[label] for _, label in chosen])
            plain = _classes(reference or model, inputs, 0, device)
            for r in levels:
                given = plain if r == 0 and reference is None else _classes(model, inputs, r, device)
                agreeing[r] += int((given == plain).sum())
                right[r] += int((given == wanted).sum())
            bar.update(len(chosen))
    return {r: Quality(agreement=agreeing[r] / count, top1=right[r] / count if labelled else None) for r in levels}


def _classes(model: LoadedModel, images: Tensor, r: int, device: torch.device) -> Tensor:
    classes: Tensor = model.run(model.input(images, device), r).logits.argmax(dim=1)
    return classes.cpu()


def quality_report(
    spec: ModelSpec, model: ModelInfo, levels: Mapping[int, Quality], data: str, images: int, device: torch.device
) -> dict[str, object]:
    """Return the contents of quality.json: what was measured, on which weights, and on how many images of `data`."""
    return {
        "model": spec.architecture,
        "weights_sha256": weights_digest(spec.checkpoint) if spec.checkpoint else None,
        "data": data,
        "images": images,
        "device": str(device),
        "dtype": model.dtype,
        "torch": torch.__version__,
        "timm": importlib.metadata.version("timm"),
        "levels": [
            {"r": r, "macs": model.cost(r).total, "top1": quality.top1, "agreement": quality.agreement}
            | ({"schedule": list(model.schedules[r])} if r in model.schedules else {})
            for r, quality in levels.items()
        ],
    }


def class_ids_of(model: ModelInfo, images: Dataset) -> list[int]:
    """Return the model's class for each label of the images. Raises DatasetError if they don't fit."""
    numbers = [str(i) for i in range(len(images.classes))]
    if list(images.classes) == numbers:
        if len(numbers) > model.num_classes:
            raise DatasetError(f"the images have {len(numbers)} classes, {model.name} has {model.num_classes}")
        return list(range(len(numbers)))
    unknown = [name for name in images.classes if name not in model.labels]
    if unknown:
        raise DatasetError(f"{model.name} has no class named {', '.join(map(repr, unknown[:5]))}")
    return [model.labels.index(name) for name in images.classes]
