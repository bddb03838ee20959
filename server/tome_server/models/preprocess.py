"""Turns an encoded image, pixels or a ready tensor into a model's input, within bounds on what a request may cost."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image

from tome_server.errors import InvalidRequestError
from tome_server.models.images.bare_image import bare
from tome_server.models.images.decoding import decode
from tome_server.models.images.image_header import ImageHeader, read_header
from tome_server.models.images.upright import Upright
from tome_server.models.transform import ImageSettings, transform

MOST_RLE_PIXELS = 4_000_000
"""Pillow unpacks run-length encoded BMPs in Python, at about a tenth of a microsecond a pixel."""


@dataclass(frozen=True)
class Limits:
    """What one image may cost."""

    max_bytes: int = 16 * 2**20
    """Encoded size, or size of a tensor."""
    max_pixels: int = 50_000_000
    """Width times height, before and after resizing."""
    max_decode_bytes: int = 320 * 2**20
    """Memory to decode and prepare it, estimated from its header."""


@dataclass(frozen=True)
class InputSize:
    """What preparing an input costs, estimated from its first bytes."""

    kind: str
    """Inputs of the same kind take about the same time for each megapixel."""
    megapixels: float
    decode_bytes: int
    """The most memory that preparing it takes."""


class Preprocess:
    """Prepares one image at a time; safe to call from several threads.

    Images that it returns as uint8 are normalised later, by `LoadedModel.input`.
    """

    def __init__(self, settings: ImageSettings, limits: Limits) -> None:
        self.settings = settings
        self.limits = limits
        self.shortest = math.floor(max(settings.input_size[1:]) / settings.crop_pct)
        """Pixels to which timm resizes the shorter side, or to fewer if height and width differ, before it crops."""

    def encoded_size(self, data: bytes) -> InputSize:
        """Return what `encoded` will cost, without decoding anything.

        Raises InvalidRequestError if the first bytes show that `encoded` will refuse the image.
        """
        header = self._header(data)
        return InputSize(header.kind_at(self.shortest), header.megapixels, header.decode_bytes(self.shortest))

    def pixels_size(self, shape: Sequence[int], data: bytes) -> InputSize:
        """Return what `pixels` will cost. Raises InvalidRequestError for pixels that it refuses."""
        if len(shape) != 3 or shape[2] != 3 or min(shape) < 1:
            raise InvalidRequestError("tensor.shape", f"must be [height, width, 3] for uint8, not {list(shape)}")
        self._check_length(shape, data, 1)
        self._check_pixels("tensor.shape", shape[1], shape[0])
        return InputSize("pixels", shape[0] * shape[1] / 1e6, 2 * len(data))

    def normalised_size(self, shape: Sequence[int], data: bytes) -> InputSize:
        """Return what `normalised` will cost. Raises InvalidRequestError for a shape or length that it refuses."""
        if tuple(shape) != self.settings.input_size:
            raise InvalidRequestError(
                "tensor.shape", f"must be {list(self.settings.input_size)} for float32, not {list(shape)}"
            )
        self._check_length(shape, data, 4)
        return InputSize("tensor", 0.0, len(data))

    def encoded(self, data: bytes) -> NDArray[np.uint8]:
        """Decode and prepare a JPEG, PNG, WebP or BMP image: [C, H, W] uint8.

        EXIF orientation is applied and transparency laid on white; no other metadata is read. Raises
        InvalidRequestError if the image can't be decoded, is animated, or is larger than the limits.
        """
        header = self._header(data)
        return transform(decode(bare(data, header), header, self.shortest, self._mode("image")), self.settings)

    def _header(self, data: bytes) -> ImageHeader:
        self._check_bytes("image", len(data))
        header = read_header(data)
        self.check(header)
        return header

    def check(self, header: ImageHeader) -> None:
        """Raise InvalidRequestError if an image with this header is larger than the limits."""
        self._check_pixels("image", header.width, header.height)
        if header.kind == "RLE BMP" and header.width * header.height > MOST_RLE_PIXELS:
            raise InvalidRequestError(
                "image",
                f"is a run-length encoded BMP of {header.width}×{header.height} pixels; "
                f"at most {MOST_RLE_PIXELS:,} pixels are accepted in that encoding",
            )
        needed = header.decode_bytes(self.shortest)
        if needed > self.limits.max_decode_bytes:
            raise InvalidRequestError(
                "image",
                f"is a {header.kind} of {header.width}×{header.height} pixels, which takes {_mib(needed)} to decode; "
                f"at most {_mib(self.limits.max_decode_bytes)} are given to one image; send it smaller, or as a "
                "baseline JPEG",
            )

    def image(self, image: Image.Image) -> NDArray[np.uint8]:
        """Prepare a decoded image of any mode: [C, H, W] uint8."""
        image.load()
        return transform(Upright(image, None, self._mode("image"), _orientation(image)), self.settings)

    def pixels(self, shape: Sequence[int], data: bytes) -> NDArray[np.uint8]:
        """Prepare RGB pixels, [H, W, 3] uint8: [C, H, W] uint8. Raises InvalidRequestError if they don't fit."""
        self.pixels_size(shape, data)
        image = Image.fromarray(np.frombuffer(data, np.uint8).reshape(shape))
        return transform(Upright(image, None, self._mode("tensor.shape"), 1), self.settings)

    def normalised(self, shape: Sequence[int], data: bytes) -> NDArray[np.float32]:
        """Return a ready input, `shape` [C, H, W] in little-endian float32, as an array.

        Raises InvalidRequestError if the shape isn't the model's or a value isn't finite.
        """
        self.normalised_size(shape, data)
        values = np.frombuffer(data, "<f4").reshape(shape)
        if not np.isfinite(values).all():
            raise InvalidRequestError("tensor.data", "holds NaN or infinity")
        return values.astype(np.float32, copy=False)

    def _mode(self, field: str) -> str:
        """Return Pillow's mode of an image that has the model's channels."""
        channels = self.settings.input_size[0]
        if channels not in (1, 3):
            raise InvalidRequestError(field, f"can't feed this model, whose input has {channels} channels")
        return "L" if channels == 1 else "RGB"

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
        # A very long and thin image becomes huge when its shorter side is resized to the model's size.
        growth = self.shortest / min(width, height)
        if width * height * growth**2 > limit:
            raise InvalidRequestError(field, f"is {width}×{height} pixels, too long and thin to be resized")


def _orientation(image: Image.Image) -> int:
    """Return the EXIF orientation of an image that Pillow has opened; 1, upright, if it can't be read."""
    try:
        value = image.getexif().get(ExifTags.Base.Orientation)
    except Exception:
        return 1
    return value if isinstance(value, int) and 1 <= value <= 8 else 1


def _mib(count: int) -> str:
    return f"{count / 2**20:,.0f} MiB"
