"""timm's evaluation transform without torch, which the process that answers requests never imports.

It gives bit for bit what `timm.data.create_transform(..., is_training=False)` gives; a test checks that. The last step,
normalisation, is done on the device (`LoadedModel.input`): until then a value takes one byte instead of four.
"""

import math
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

CROP_MODES = ("center", "squash", "border")
INTERPOLATIONS = ("nearest", "bilinear", "bicubic", "box", "hamming", "lanczos")


@dataclass(frozen=True)
class ImageSettings:
    """How a model's images are prepared, in timm's terms. Raises ValueError for settings that make no sense."""

    input_size: tuple[int, int, int]
    """channels, height, width"""
    mean: tuple[float, ...]
    std: tuple[float, ...]
    interpolation: str
    crop_pct: float
    crop_mode: str

    def __post_init__(self) -> None:
        channels, *_ = self.input_size
        if min(self.input_size) < 1:
            raise ValueError(f"input_size must be channels, height and width, not {list(self.input_size)}")
        if len(self.mean) != channels or len(self.std) != channels or min(self.std) <= 0:
            raise ValueError(f"mean and std take {channels} numbers, one a channel, and no std may be 0")
        if not self.crop_pct > 0:
            raise ValueError(f"crop_pct must be positive, and is {self.crop_pct}")
        for value, valid in ((self.crop_mode, CROP_MODES), (self.interpolation, INTERPOLATIONS)):
            if value not in valid:
                raise ValueError(f"{value!r} is none of {', '.join(valid)}")

    @classmethod
    def from_timm(cls, data_config: dict[str, Any]) -> "ImageSettings":
        """Take the settings from what timm's `resolve_data_config` returns."""
        return cls(
            input_size=tuple(data_config["input_size"]),
            mean=tuple(data_config["mean"]),
            std=tuple(data_config["std"]),
            interpolation=data_config["interpolation"],
            crop_pct=float(data_config["crop_pct"]),
            crop_mode=data_config["crop_mode"],
        )

    @property
    def scaled_size(self) -> tuple[int, int]:
        """Height and width that images are resized to; the crop is `crop_pct` of them."""
        _, height, width = self.input_size
        return math.floor(height / self.crop_pct), math.floor(width / self.crop_pct)


class Picture(Protocol):
    """An image that can be resized: Pillow's with the model's channels, or one that is converted to that meanwhile."""

    @property
    def size(self) -> tuple[int, int]:
        """Width and height."""

    def resize(self, size: tuple[int, int], resample: Image.Resampling) -> Image.Image:
        """Return it resized to a width and height."""


def transform(picture: Picture, settings: ImageSettings) -> NDArray[np.uint8]:
    """Resize and crop an image. Return it as [C, H, W], not yet normalised."""
    _, height, width = settings.input_size
    resample = Image.Resampling[settings.interpolation.upper()]
    resized = picture.resize(_resized_size(*picture.size, settings), resample)
    border = settings.crop_mode == "border"
    fill = tuple(round(255 * value) for value in settings.mean) if border else (0,) * len(settings.mean)
    pixels = np.asarray(_centre(resized, height, width, fill), np.uint8).reshape(height, width, -1)
    return pixels.transpose(2, 0, 1).copy()


def _resized_size(width: int, height: int, settings: ImageSettings) -> tuple[int, int]:
    """Return the width and height to resize an image to. Only `squash` changes its proportions."""
    scaled_height, scaled_width = settings.scaled_size
    if settings.crop_mode == "squash":
        return scaled_width, scaled_height
    if settings.crop_mode == "center" and scaled_height == scaled_width:
        short, long = sorted((width, height))
        longer = int(scaled_height * long / short)
        return (scaled_height, longer) if width <= height else (longer, scaled_height)
    # The smallest size that covers the scaled size or, with a border, the largest that lies within it.
    choose = max if settings.crop_mode == "border" else min
    ratio = choose(height / scaled_height, width / scaled_width)
    return round(width / ratio), round(height / ratio)


def _centre(image: Image.Image, height: int, width: int, fill: tuple[int, ...]) -> Image.Image:
    """Return the middle of an image; if the image is smaller, in the middle of a border in the colour `fill`."""
    wider, higher = max(0, width - image.width), max(0, height - image.height)
    if wider or higher:
        border = (wider // 2, higher // 2, (wider + 1) // 2, (higher + 1) // 2)
        image = ImageOps.expand(image, border, fill if len(fill) > 1 else fill[0])
    left, top = round((image.width - width) / 2), round((image.height - height) / 2)
    return image.crop((left, top, left + width, top + height))
