"""From an encoded image, pixels or a ready tensor to a model's input, with bounds on what a request may cost."""

import io
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from tome_server.errors import InvalidRequestError
from tome_server.models.transform import ImageSettings, transform

FORMATS = ("JPEG", "PNG", "WEBP", "BMP")

# Pillow's own guard warns at a size of its choosing and is process-wide; `max_pixels` below is checked on the header,
# before anything is decoded.
Image.MAX_IMAGE_PIXELS = None


@dataclass(frozen=True)
class Limits:
    """What one image may cost."""

    max_bytes: int = 16 * 2**20
    """Encoded size, or size of a tensor."""
    max_pixels: int = 50_000_000
    """Width times height, before and after resizing."""


class Preprocess:
    """Prepares one image at a time; safe to call from several threads.

    What it returns as uint8 is still to be normalised, which `LoadedModel.input` does.
    """

    def __init__(self, settings: ImageSettings, limits: Limits) -> None:
        self.settings = settings
        self.limits = limits
        # timm resizes the shorter side to this, or to less where height and width differ, then crops.
        self._resized = math.floor(max(settings.input_size[1:]) / settings.crop_pct)

    def encoded(self, data: bytes) -> NDArray[np.uint8]:
        """Decode and prepare a JPEG, PNG, WebP or BMP image: [C, H, W] uint8.

        EXIF orientation is honoured; transparency is laid on white. Raises InvalidRequestError if it can't be decoded,
        is animated, or is larger than the limits.
        """
        if not data:
            raise InvalidRequestError("image", "is empty")
        self._check_bytes("image", len(data))
        try:
            image = Image.open(io.BytesIO(data), formats=(*FORMATS, "GIF"))
        except Exception as error:
            raise InvalidRequestError("image", f"is not a {_listed(FORMATS)} image") from error
        # A photo with a preview or a depth map beside it is a JPEG of format MPO; its first frame is the photo.
        if image.format not in (*FORMATS, "MPO"):
            raise InvalidRequestError("image", f"is a {image.format}; accepted are {_listed(FORMATS)}")
        if getattr(image, "is_animated", False) and image.format != "MPO":
            raise InvalidRequestError("image", "is animated; send one frame")
        self._check_pixels("image", image.width, image.height)
        # A JPEG decodes several times faster straight to the smallest of its scales that is still large enough.
        image.draft(None, (self._resized, self._resized))
        try:
            # Hostile bytes make Pillow's plugins raise almost anything.
            image.load()
            flat = _flatten(ImageOps.exif_transpose(image))
        except Exception as error:
            raise InvalidRequestError("image", f"is damaged: {error}") from error
        return self._prepare(flat)

    def image(self, image: Image.Image) -> NDArray[np.uint8]:
        """Prepare a decoded image of any mode: [C, H, W] uint8."""
        return self._prepare(_flatten(ImageOps.exif_transpose(image)))

    def pixels(self, shape: Sequence[int], data: bytes) -> NDArray[np.uint8]:
        """Prepare RGB pixels, [H, W, 3] uint8: [C, H, W] uint8. Raises InvalidRequestError if they don't fit."""
        if len(shape) != 3 or shape[2] != 3 or min(shape) < 1:
            raise InvalidRequestError("tensor.shape", f"must be [height, width, 3] for uint8, not {list(shape)}")
        self._check_length(shape, data, 1)
        self._check_pixels("tensor.shape", shape[1], shape[0])
        return self._prepare(Image.fromarray(np.frombuffer(data, np.uint8).reshape(shape)))

    def normalised(self, shape: Sequence[int], data: bytes) -> NDArray[np.float32]:
        """Take a model's input as it is, `shape` [C, H, W] little-endian float32.

        Raises InvalidRequestError if the shape isn't the model's or a value isn't finite.
        """
        if tuple(shape) != self.settings.input_size:
            raise InvalidRequestError(
                "tensor.shape", f"must be {list(self.settings.input_size)} for float32, not {list(shape)}"
            )
        self._check_length(shape, data, 4)
        values = np.frombuffer(data, "<f4").reshape(shape)
        if not np.isfinite(values).all():
            raise InvalidRequestError("tensor.data", "holds NaN or infinity")
        return values.astype(np.float32, copy=False)

    def _prepare(self, image: Image.Image) -> NDArray[np.uint8]:
        channels = self.settings.input_size[0]
        if channels == 1:
            image = image.convert("L")
        elif channels != 3:
            raise InvalidRequestError("image", f"can't feed this model, whose input has {channels} channels")
        return transform(image, self.settings)

    def _check_bytes(self, field: str, length: int) -> None:
        if length > self.limits.max_bytes:
            raise InvalidRequestError(field, f"has {length:,} bytes; at most {self.limits.max_bytes:,} are accepted")

    def _check_length(self, shape: Sequence[int], data: bytes, item: int) -> None:
        self._check_bytes("tensor.data", len(data))
        wanted = math.prod(shape) * item
        if len(data) != wanted:
            raise InvalidRequestError("tensor.data", f"has {len(data):,} bytes; {list(shape)} takes {wanted:,}")

    def _check_pixels(self, field: str, width: int, height: int) -> None:
        limit = self.limits.max_pixels
        if width * height > limit:
            raise InvalidRequestError(field, f"is {width}×{height} pixels; at most {limit:,} pixels are accepted")
        # A thread of pixels grows enormous when its shorter side is brought to the model's size.
        growth = self._resized / min(width, height)
        if width * height * growth**2 > limit:
            raise InvalidRequestError(field, f"is {width}×{height} pixels, too long and thin to be resized")


def _flatten(image: Image.Image) -> Image.Image:
    """Return `image` in RGB, as it would look on white paper."""
    if image.mode.startswith("I"):  # 16 bits a pixel; convert() would clip instead of scale
        wide = np.asarray(image).astype(np.int64).clip(0, 65535)
        return Image.fromarray((wide // 257).astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        layer = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer).convert("RGB")
    return image.convert("RGB")


def _listed(names: Sequence[str]) -> str:
    return f"{', '.join(names[:-1])} or {names[-1]}"
