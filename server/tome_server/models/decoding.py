"""From the bare bytes of an image to its pixels, by Pillow."""

import io

import numpy as np
from PIL import Image, ImageChops, ImageFile

from tome_server.errors import InvalidRequestError
from tome_server.models.bare_image import BareImage
from tome_server.models.image_header import ImageHeader, cut_off, damaged
from tome_server.models.upright import Upright

# Pillow's own guard warns at a size of its choosing, and is process-wide. `Preprocess` checks sizes on the header,
# before anything is decoded.
Image.MAX_IMAGE_PIXELS = None


def decode(stored: BareImage, header: ImageHeader, shortest: int, mode: str) -> Upright:
    """Decode an image, to be made upright and into `mode` piece by piece.

    A JPEG is decoded straight to the smallest of its scales at which no side is shorter than `shortest`. That is
    several times faster.

    Raises InvalidRequestError if the pixels are damaged or cut off.
    """
    try:
        if stored.whole:
            return Upright(*_with_transparency(stored.data, header, shortest), mode, stored.orientation)
        return Upright(_without_end(stored.data, header, shortest), None, mode, stored.orientation)
    except InvalidRequestError:
        raise
    except MemoryError as error:
        raise InvalidRequestError("image", "takes more memory to decode than there is") from error
    except Exception as error:
        # Hostile bytes make Pillow raise almost anything, in words that are about Pillow.
        if "truncated" in str(error):
            raise cut_off("before its last pixel") from error
        raise damaged("its pixels can't be decoded") from error


def _opened(data: bytes, header: ImageHeader, shortest: int) -> ImageFile.ImageFile:
    image = Image.open(io.BytesIO(data), formats=(header.format,))
    if image.size != (header.width, header.height):
        raise damaged("its pixels are of another size than its header says")
    image.draft(None, (shortest, shortest))
    return image


# ---- a transparent colour of 16 bits a channel ----


def _with_transparency(data: bytes, header: ImageHeader, shortest: int) -> tuple[Image.Image, Image.Image | None]:
    """Decode an image, with a mask of its transparent pixels where Pillow can't tell them."""
    image = _opened(data, header, shortest)
    colour = image.info.get("transparency")
    if "16-bit" not in header.kind or image.mode != "RGB" or colour is None:
        image.load()
        return image, None
    # Of 16 bits Pillow keeps the upper eight, which many other colours share with the transparent one. Taken for
    # little-endian, the same file shows the lower eight.
    (tile,) = image.tile
    image.tile = [tile._replace(args="RGB;16L")]
    image.load()
    transparent = _of_colour(image, [value & 0xFF for value in colour])
    del image
    image = _opened(data, header, shortest)
    image.load()
    del image.info["transparency"]
    return image, ImageChops.logical_and(transparent, _of_colour(image, [value >> 8 for value in colour]))


def _of_colour(image: Image.Image, colour: list[int]) -> Image.Image:
    """Return a mask that is set where an RGB image has this colour."""
    mask = Image.new("1", image.size)
    step = max(1, 2**19 // image.width)
    for top in range(0, image.height, step):
        strip = np.asarray(image.crop((0, top, image.width, min(image.height, top + step))))
        mask.paste(Image.fromarray((strip == np.array(colour, np.uint8)).all(axis=-1)), (0, top))
    return mask


# ---- a JPEG without its end ----

_END = b"\xff\xd9"
_NOT_PIXELS = bytes(range(255)) * 2
_PAST_THE_END = _NOT_PIXELS + b"".join(b"\xff" + bytes([restart]) + _NOT_PIXELS for restart in range(0xD0, 0xD8))
_LARGEST_BLOCK = 32
"""Pixels; rows that are coded together."""


def _without_end(data: bytes, header: ImageHeader, shortest: int) -> Image.Image:
    """Decode a JPEG that stops without saying so, as cameras and cut video streams leave them, if its pixels are whole.

    A decoder makes up the pixels that are missing, and doesn't say that it did. But if what follows the file changes
    the last pixels, then the file didn't hold them.
    """
    other = _opened(data + _PAST_THE_END + _END, header, shortest)
    other.load()
    width, height = other.size
    last = (0, max(0, height - _LARGEST_BLOCK), width, height)
    bottom = other.crop(last)
    del other
    image = _opened(data + _END, header, shortest)
    image.load()
    if ImageChops.difference(image.crop(last), bottom).getbbox() is not None:
        raise cut_off("before its last pixel")
    return image
