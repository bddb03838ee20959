"""Decodes bare images by Pillow."""

import hashlib
import io
import logging

import numpy as np
from PIL import Image, ImageFile

from tome_server.errors import InvalidRequestError
from tome_server.models.images.bare_image import BareImage, png_lacks_rows
from tome_server.models.images.image_header import ImageHeader, cut_off, damaged
from tome_server.models.images.upright import Upright

# Pillow's own guard warns at a size of its choosing, and is process-wide. `Preprocess` checks sizes on the header,
# before anything is decoded.
Image.MAX_IMAGE_PIXELS = None

# At level debug Pillow logs each chunk of each image.
logging.getLogger("PIL").setLevel(logging.WARNING)


def decode(stored: BareImage, header: ImageHeader, shortest: int, mode: str) -> Upright:
    """Decode an image. It is turned upright and converted to `mode` later, piece by piece.

    A JPEG is decoded straight to the smallest of its scales at which no side is shorter than `shortest`. That is
    several times faster.

    Raises InvalidRequestError if the pixels are damaged or cut off.
    """
    try:
        image, transparent = _pixels(stored, header, shortest)
    except InvalidRequestError:
        raise
    except MemoryError as error:
        raise InvalidRequestError("image", "takes more memory to decode than there is") from error
    except Exception as error:
        # Hostile bytes make Pillow raise almost anything, in words that are about Pillow.
        if "truncated" in str(error):
            raise cut_off("before its last pixel") from error
        raise damaged("its pixels can't be decoded") from error
    return Upright(image, transparent, mode, stored.orientation)


def _pixels(stored: BareImage, header: ImageHeader, shortest: int) -> tuple[Image.Image, Image.Image | None]:
    """Decode an image, with a mask of its transparent pixels where Pillow can't tell them."""
    if not stored.whole:
        return _without_end(stored.data, header, shortest), None
    image, transparent = _with_transparency(stored.data, header, shortest)
    if header.format == "PNG" and _ends_in_black(image) and png_lacks_rows(stored.data):
        raise cut_off("before its last pixel")
    return image, transparent


def _ends_in_black(image: Image.Image) -> bool:
    """Return whether the last row is all zeros, or the one before it, which an interlaced PNG stores later.

    Pillow leaves rows so that aren't there.
    """
    width, height = image.size
    rows = (image.crop((0, row, width, row + 1)).tobytes() for row in range(max(0, height - 2), height))
    return any(not row.strip(b"\0") for row in rows)


def _opened(data: bytes, header: ImageHeader, shortest: int) -> ImageFile.ImageFile:
    image = Image.open(io.BytesIO(data), formats=(header.format,))
    if image.size != (header.width, header.height):
        raise damaged("its pixels are of another size than its header says")
    image.draft(None, (shortest, shortest))
    return image


def _loaded(data: bytes, header: ImageHeader, shortest: int) -> Image.Image:
    image = _opened(data, header, shortest)
    image.load()
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
    transparent = Image.new("1", image.size, 1)
    _keep(transparent, image, [value & 0xFF for value in colour])
    del image
    upper = _loaded(data, header, shortest)
    _keep(transparent, upper, [value >> 8 for value in colour])
    del upper.info["transparency"]
    return upper, transparent


def _keep(mask: Image.Image, image: Image.Image, colour: list[int]) -> None:
    """Clear `mask` where an RGB image has another colour."""
    step = max(1, 2**19 // image.width)
    for top in range(0, image.height, step):
        box = (0, top, image.width, min(image.height, top + step))
        equal = (np.asarray(image.crop(box)) == np.array(colour, np.uint8)).all(axis=-1)
        mask.paste(Image.fromarray(equal & np.asarray(mask.crop(box))), box)


# ---- a JPEG without its end ----

_END = b"\xff\xd9"
_NOT_PIXELS = bytes(1 + 89 * at % 253 for at in range(1, 254)) * 2  # in no order, and never 0x00 or 0xFF


def _without_end(data: bytes, header: ImageHeader, shortest: int) -> Image.Image:
    """Decode a JPEG without an end marker, as cameras and cut video streams leave them, if its pixels are complete.

    A decoder makes up the pixels that are missing, and doesn't say that it did. But if what follows the file changes
    the pixels, then the file didn't hold them.
    """
    data = data.rstrip(b"\xff")  # half of a marker, or of a byte 0xFF
    other = _digest(_loaded(data + _something_else(data) + _END, header, shortest))
    image = _loaded(data + _END, header, shortest)
    if _digest(image) != other:
        raise cut_off("before its last pixel")
    return image


def _something_else(data: bytes) -> bytes:
    """Return data that no decoder would make up, to append to `data` and after each restart that is due then."""
    last = max(range(8), key=lambda number: data.rfind(bytes([0xFF, 0xD0 + number])))
    due = ((last + after) % 8 for after in range(1, 9))
    return _NOT_PIXELS + b"".join(bytes([0xFF, 0xD0 + number]) + _NOT_PIXELS for number in due)


def _digest(image: Image.Image) -> bytes:
    digest = hashlib.blake2b()
    for top in range(0, image.height, 64):
        digest.update(image.crop((0, top, image.width, min(image.height, top + 64))).tobytes())
    return digest.digest()
