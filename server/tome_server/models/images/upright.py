"""A decoded image as it is to be looked at: upright, on white paper, in a model's channels.

It is made in strips, for a copy of 50 million pixels takes 200 MB, and turning, compositing and converting would take a
copy each.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from PIL import Image

from tome_server.models.images.image_header import WHOLE_PIXELS

_TURN = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_GREY = {"1", "L", "LA", "La"}
_SIDEWAYS = {5, 6, 7, 8}
_FROM_THE_RIGHT = {2, 3, 7, 8}
_FROM_THE_BOTTOM = {3, 4, 6, 7}

_STRIP_PIXELS = 2**19
"""Small enough that a strip and its copies stay in the processor's cache."""


@dataclass(frozen=True)
class Upright:
    """Looks like a Pillow image, with the methods that `transform` uses."""

    stored: Image.Image
    """As it was decoded, of any mode."""
    transparent: Image.Image | None
    """A mask of the pixels of `stored` that are transparent though its mode doesn't say so."""
    mode: str
    """What its parts are converted to: RGB, or L for a model of one channel."""
    orientation: int
    """EXIF's, from 1 to 8: 1 if `stored` is upright."""

    @property
    def size(self) -> tuple[int, int]:
        """Width and height when upright."""
        width, height = self.stored.size
        return (height, width) if self.orientation in _SIDEWAYS else (width, height)

    def resize(self, size: tuple[int, int], resample: Image.Resampling) -> Image.Image:
        """Resize the upright image to a width and height."""
        width, height = self.size
        if self._ready:
            resized = self.stored.resize(size, resample)
        elif self._colours == "L" or width * height <= WHOLE_PIXELS:
            resized = self._whole().resize(size, resample)
        else:
            resized = Image.merge("RGB", [self._whole(band).resize(size, resample) for band in "RGB"])
        return resized if resized.mode == self.mode else resized.convert(self.mode)

    @property
    def _colours(self) -> str:
        """RGB, or L if either the image or the model is grey."""
        return "L" if self.mode == "L" or self.stored.mode in _GREY or self.stored.mode.startswith("I") else "RGB"

    @property
    def _ready(self) -> bool:
        """Whether `stored` can be resized as it is."""
        stored = self.stored
        return (
            stored.mode == self._colours
            and self.orientation == 1
            and self.transparent is None
            and not stored.has_transparency_data
        )

    def _whole(self, band: str | None = None) -> Image.Image:
        """Return all of the upright image, or one of its channels."""
        whole = Image.new(self._colours if band is None else "L", self.size)
        for top, strip in self._strips():
            whole.paste(strip if band is None else strip.getchannel(band), (0, top))
        return whole

    def _strips(self) -> Iterator[tuple[int, Image.Image]]:
        width, height = self.size
        rows = max(1, _STRIP_PIXELS // width)
        for top in range(0, height, rows):
            box = (0, top, width, min(height, top + rows))
            strip = _on_white(self._part(self.stored, box))
            if self.transparent is not None:
                strip.paste("white", None, self._part(self.transparent, box))
            yield top, strip if strip.mode == self._colours else strip.convert(self._colours)

    def _part(self, image: Image.Image, box: tuple[int, int, int, int]) -> Image.Image:
        left, top, right, bottom = box
        width, height = image.size
        if self.orientation in _SIDEWAYS:
            left, top, right, bottom = top, left, bottom, right
        if self.orientation in _FROM_THE_RIGHT:
            left, right = width - right, width - left
        if self.orientation in _FROM_THE_BOTTOM:
            top, bottom = height - bottom, height - top
        part = image.crop((left, top, right, bottom))
        turn = _TURN.get(self.orientation)
        return part if turn is None else part.transpose(turn)


def _on_white(image: Image.Image) -> Image.Image:
    """Return `image` in RGB or grey, as it would look on white paper."""
    if image.mode.startswith("I"):  # 16 bits a pixel; convert() would clip instead of scale
        values = np.asarray(image)
        if values.dtype != np.uint16:
            values = values.clip(0, 65535)
        grey = (values >> 8).astype(np.uint8)
        transparent = image.info.get("transparency")
        if isinstance(transparent, int):
            grey[values == transparent] = 255
        return Image.fromarray(grey)
    if image.has_transparency_data:
        layer = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer).convert("RGB")
    return image if image.mode in ("RGB", "L") else image.convert("RGB")
