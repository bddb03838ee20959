"""What an encoded image is, read from its first bytes: format, size, and what decoding it takes.

Nothing is decoded and Pillow isn't asked, so that a request's size and cost are known before anything is spent on it.
The time is bounded whatever the bytes are: some tens of microseconds, and under a millisecond for the worst.
"""

import re
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

from tome_server.errors import InvalidRequestError

FORMATS = ("JPEG", "PNG", "WEBP", "BMP")

ACCEPTED = f"{', '.join(FORMATS[:-1])} or {FORMATS[-1]}"

PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"

JPEG_SCALES = (8, 4, 2, 1)
"""A JPEG is decoded straight to one of these fractions of its size."""

WHOLE_PIXELS = 2**23
"""Decoded images of more pixels are resized one channel after the other, which takes longer and less memory."""

_MIB = 2**20

_MOST_SEGMENTS = 512
"""JPEG segments before the pixels. 256 of the largest size fill a file of 16 MiB."""

_MOST_CHUNKS = 64
"""WebP chunks before the pixels; the format knows of four."""

_MOST_JUNK = 4096
"""Bytes between two JPEG segments. There should be none, and decoders skip what is there."""


@dataclass(frozen=True)
class ImageHeader:
    """What an encoded image says of itself."""

    format: str
    """One of FORMATS."""
    width: int
    """As stored: EXIF orientation may turn the image afterwards."""
    height: int
    kind: str
    """How the image is encoded, in words: "JPEG", "progressive JPEG", "16-bit PNG" and so on."""
    pixel_bytes: float
    """Memory of one decoded pixel."""
    working_bytes: float
    """Memory that the decoder takes besides, for each pixel of the file."""
    encoded_bytes: int
    """Length of the file."""

    @property
    def megapixels(self) -> float:
        """Width times height as stored, in millions."""
        return self.width * self.height / 1e6

    def scale(self, shortest: int) -> int:
        """Return by how much a JPEG is scaled down while it is decoded; 1 for the other formats.

        `shortest` is the length that the shorter side is resized to for the model.
        """
        if self.format != "JPEG":
            return 1
        most = min(self.width, self.height) // shortest
        return next((scale for scale in JPEG_SCALES if scale <= most), 1)

    def kind_at(self, shortest: int) -> str:
        """Return what decode time is learned by: images of one such kind take about the same time a megapixel.

        It is `kind`, and for a JPEG the scale that it is decoded at.
        """
        scale = self.scale(shortest)
        return self.kind if scale == 1 else f"{self.kind} at 1/{scale}"

    def decode_bytes(self, shortest: int) -> int:
        """Estimate the peak memory, from above, of decoding the image and resizing its shorter side to `shortest`.

        The encoded bytes count only as the copy of them that is made.
        """
        scale = self.scale(shortest)
        width, height = -(-self.width // scale), -(-self.height // scale)
        growth = max(1.0, shortest / min(width, height))
        return int(
            width * height * (self.pixel_bytes + 1)  # a channel of the upright image
            + min(width * height, WHOLE_PIXELS) * 3  # all three, if the image is small
            + self.width * self.height * self.working_bytes
            + 4 * shortest * max(width, height) * growth  # between resizing one side and the other, or afterwards
            + self.encoded_bytes
            + 16 * _MIB  # strips, and what decoders take however small the image is
        )


class Segment(NamedTuple):
    """A piece of a JPEG: `data[start:end]` is the segment with its marker, `data[body:end]` what it holds."""

    marker: int
    start: int
    body: int
    end: int


def read_header(data: bytes) -> ImageHeader:
    """Read what kind of image `data` is.

    Raises:
        InvalidRequestError: it is in none of FORMATS, its header is damaged or cut off, or it has no pixels.
    """
    if not data:
        raise InvalidRequestError("image", "is empty")
    if data.startswith(b"\xff\xd8\xff"):
        header = _jpeg(data)
    elif data.startswith(PNG_SIGNATURE):
        header = _png(data)
    elif data.startswith(b"RIFF") and data[8:12] == b"WEBP":
        header = _webp(data)
    elif data.startswith(b"BM"):
        header = _bmp(data)
    else:
        raise InvalidRequestError("image", _foreign(data))
    if header.width < 1 or header.height < 1:
        raise InvalidRequestError("image", f"is {header.width}×{header.height} pixels, which is no image")
    return header


def damaged(what: str) -> InvalidRequestError:
    """Return the refusal of an image that contradicts its own format."""
    return InvalidRequestError("image", f"is damaged: {what}")


def cut_off(where: str) -> InvalidRequestError:
    """Return the refusal of an image that ends too early."""
    return InvalidRequestError("image", f"is cut off: it ends {where}")


# ---- JPEG ----

START_OF_SCAN, END_OF_IMAGE = 0xDA, 0xD9
_WITHOUT_LENGTH = {0x01, *range(0xD0, 0xD8)}
_BASELINE, _EXTENDED, _PROGRESSIVE = 0xC0, 0xC1, 0xC2
_FRAMES = {*range(0xC0, 0xD0)} - {0xC4, 0xC8, 0xCC}
_MARKER = re.compile(rb"\xff[^\x00\xff]")


def jpeg_segments(data: bytes) -> Iterator[Segment]:
    """Walk the segments of a JPEG as far as the first scan, which comes last.

    Raises InvalidRequestError if there is no scan, or too much comes before it.
    """
    at = 2
    for _ in range(_MOST_SEGMENTS):
        found = _MARKER.search(data, at, at + _MOST_JUNK)
        if found is None:
            if at + _MOST_JUNK < len(data):
                raise damaged("there is something else where a JPEG segment must begin")
            break
        start, body = found.span()
        marker = data[body - 1]
        if marker in _WITHOUT_LENGTH:
            at = body
            continue
        if marker == END_OF_IMAGE:
            raise damaged("it is a JPEG without pixels")
        length = int.from_bytes(data[body : body + 2])
        at = body + length
        if at > len(data) or body + 2 > len(data):
            break
        if length < 2:
            raise damaged("a JPEG segment has an impossible length")
        yield Segment(marker, start, body + 2, at)
        if marker == START_OF_SCAN:
            return
    else:
        raise InvalidRequestError("image", f"has more than {_MOST_SEGMENTS} segments before its pixels")
    raise cut_off("before its pixels")


def _jpeg(data: bytes) -> ImageHeader:
    frame: Segment | None = None
    components = 0
    for segment in jpeg_segments(data):
        if segment.marker in _FRAMES:
            if frame is not None:
                raise damaged("it is a JPEG of two sizes")
            frame = segment
            components = _check_frame(data, frame)
        scan = segment
    if frame is None:
        raise damaged("it is a JPEG that doesn't say its size")
    height, width = struct.unpack_from(">HH", data, frame.body + 1)
    # Where one scan doesn't hold everything, decoders keep all coefficients, two bytes each, until the last scan.
    several = frame.marker == _PROGRESSIVE or data[scan.body : scan.body + 1] != bytes([components])
    sampling = [divmod(data[at], 16) for at in range(frame.body + 7, frame.body + 6 + 3 * components, 3)]
    per_pixel = sum(h * v for h, v in sampling) / (max(h for h, _ in sampling) * max(v for _, v in sampling))
    return ImageHeader(
        "JPEG",
        width,
        height,
        kind="progressive JPEG" if several else "JPEG",
        pixel_bytes=1 if components == 1 else 4,
        working_bytes=2 * per_pixel if several else 0,
        encoded_bytes=len(data),
    )


def _check_frame(data: bytes, frame: Segment) -> int:
    """Return how many components a JPEG has, if it is one that can be decoded."""
    if frame.marker not in (_BASELINE, _EXTENDED, _PROGRESSIVE):
        raise InvalidRequestError("image", "is a lossless, arithmetic-coded or hierarchical JPEG, which isn't accepted")
    if frame.end - frame.body < 6:
        raise damaged("the JPEG segment with its size is too short")
    bits, components = data[frame.body], data[frame.body + 5]
    if bits != 8:
        raise InvalidRequestError("image", f"is a JPEG of {bits} bits a sample; 8 are accepted")
    if components not in (1, 3, 4):
        raise InvalidRequestError("image", f"is a JPEG of {components} components; 1, 3 or 4 are accepted")
    if frame.end - frame.body < 6 + 3 * components:
        raise damaged("the JPEG segment with its size is too short")
    for at in range(frame.body + 7, frame.body + 6 + 3 * components, 3):
        across, down = divmod(data[at], 16)
        if not (1 <= across <= 4 and 1 <= down <= 4):
            raise damaged("a JPEG component has an impossible sampling factor")
    return components


# ---- PNG ----

_PNG_DEPTHS = {0: (1, 2, 4, 8, 16), 2: (8, 16), 3: (1, 2, 4, 8), 4: (8, 16), 6: (8, 16)}
_GREY, _RGB, _PALETTE = 0, 2, 3


def _png(data: bytes) -> ImageHeader:
    if len(data) < 33:
        raise cut_off("in its header")
    if data[8:16] != b"\0\0\0\rIHDR":
        raise damaged("it is a PNG that doesn't begin with its header, IHDR")
    if zlib.crc32(data[12:29]) != int.from_bytes(data[29:33]):
        raise damaged("the check sum of its header, IHDR, is wrong")
    width, height, depth, colour, compression, filtering, interlace = struct.unpack_from(">IIBBBBB", data, 16)
    if depth not in _PNG_DEPTHS.get(colour, ()):
        raise damaged(f"there is no PNG of colour type {colour} with {depth} bits a sample")
    if compression or filtering or interlace > 1:
        raise damaged("it is a PNG of a compression, filter or interlace method that doesn't exist")
    deep = depth == 16
    single = colour in (_GREY, _PALETTE)
    return ImageHeader(
        "PNG",
        width,
        height,
        kind=f"{'interlaced ' if interlace else ''}{'16-bit ' if deep else ''}PNG",
        pixel_bytes=(2 if deep else 1) if single else 4,
        # A transparent colour of 16 bits is looked for in a decoding of its own, which leaves a mask.
        working_bytes=1 if deep and colour == _RGB else 0,
        encoded_bytes=len(data),
    )


# ---- WebP ----

_WEBP_WORKING_BYTES = 11
"""Pillow's decoder keeps two canvases for animations and hands over a copy, all in RGBA; the copy is gone before a
channel is made."""


def _webp(data: bytes) -> ImageHeader:
    if len(data) < 30:
        raise cut_off("in its header")
    size = int.from_bytes(data[4:8], "little") + 8
    if size > len(data):
        raise cut_off(f"after {len(data):,} of {size:,} bytes")
    first = data[12:16]
    if first == b"VP8X":
        width = int.from_bytes(data[24:27], "little") + 1
        height = int.from_bytes(data[27:30], "little") + 1
        lossless = _webp_pixels(data) == b"VP8L"
    elif first == b"VP8L":
        if data[20] != 0x2F:
            raise damaged("its lossless WebP pixels don't begin as they must")
        bits = int.from_bytes(data[21:25], "little")
        width, height = (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1
        lossless = True
    elif first == b"VP8 ":
        if data[20] & 1 or data[23:26] != b"\x9d\x01\x2a":
            raise damaged("its WebP pixels don't begin as they must")
        width, height = (length & 0x3FFF for length in struct.unpack_from("<HH", data, 26))
        lossless = False
    else:
        raise damaged("it is a WebP whose first chunk is of no known type")
    return ImageHeader(
        "WEBP",
        width,
        height,
        kind="lossless WebP" if lossless else "WebP",
        pixel_bytes=4,
        working_bytes=_WEBP_WORKING_BYTES,
        encoded_bytes=len(data),
    )


def _webp_pixels(data: bytes) -> bytes:
    """Return the type of the chunk that holds the pixels, of the first frame if there are several."""
    at = 12
    for _ in range(_MOST_CHUNKS):
        name = data[at : at + 4]
        if name in (b"VP8 ", b"VP8L"):
            return name
        if len(data) < at + 8:
            raise damaged("it is a WebP without pixels")
        if name == b"ANMF":
            at += 8 + 16  # its chunks follow the frame's header
        else:
            length = int.from_bytes(data[at + 4 : at + 8], "little")
            at += 8 + length + length % 2
    raise InvalidRequestError("image", f"has more than {_MOST_CHUNKS} chunks before its pixels")


# ---- BMP ----

_BMP_HEADERS = (40, 52, 56, 64, 108, 124)
_RAW, _RLE8, _RLE4, _BITFIELDS = range(4)
_BMP_BITS = {_RAW: (1, 4, 8, 16, 24, 32), _RLE8: (8,), _RLE4: (4,), _BITFIELDS: (16, 24, 32)}


def _bmp(data: bytes) -> ImageHeader:
    if len(data) < 26:
        raise cut_off("in its header")
    (offset, size) = struct.unpack_from("<II", data, 10)
    if size == 12:
        width, height, _, bits = struct.unpack_from("<HHHH", data, 18)
        compression = _RAW
    elif size in _BMP_HEADERS:
        if len(data) < 14 + size:
            raise cut_off("in its header")
        width, height, _, bits, compression = struct.unpack_from("<iiHHI", data, 18)
        height = abs(height)  # negative where the first row is the topmost
    else:
        raise damaged(f"there is no BMP header of {size} bytes")
    if bits not in _BMP_BITS.get(compression, ()):
        raise InvalidRequestError(
            "image", f"is a BMP of compression {compression} with {bits} bits a pixel, which isn't accepted"
        )
    packed = compression in (_RLE8, _RLE4)
    if not packed and width > 0 and height > 0:
        row = (width * bits + 31) // 32 * 4
        needed = max(offset, 14 + size) + row * (height - 1) + (width * bits + 7) // 8
        if needed > len(data):
            raise cut_off(f"after {len(data):,} of {needed:,} bytes")
    return ImageHeader(
        "BMP",
        width,
        height,
        kind="RLE BMP" if packed else "BMP",
        pixel_bytes=1 if bits <= 8 else 4,
        working_bytes=2.25 if packed else 0,  # unpacked by Python into an array that grows, then copied
        encoded_bytes=len(data),
    )


# ---- what is something else ----

_FOREIGN = (
    (b"GIF8", "a GIF image"),
    (b"II*\0", "a TIFF image"),
    (b"MM\0*", "a TIFF image"),
    (b"II+\0", "a TIFF image"),
    (b"MM\0+", "a TIFF image"),
    (b"\0\0\0\x0cjP  ", "a JPEG 2000 image"),
    (b"\xff\x4f\xff\x51", "a JPEG 2000 image"),
    (b"\0\0\0\x0cJXL ", "a JPEG XL image"),
    (b"\xff\x0a", "a JPEG XL image"),
    (b"\0\0\1\0", "an ICO image"),
    (b"8BPS", "a Photoshop file"),
    (b"%PDF", "a PDF document"),
    (b"%!PS", "a PostScript document"),
    (b"\x89PNG", "a PNG image whose first bytes are damaged"),
    (b"data:image/", "a data URL; send the bytes that it encodes"),
    (b"/9j/", "text in base64; send the bytes that it encodes"),
    (b"iVBORw0KGgo", "text in base64; send the bytes that it encodes"),
    (b"UklGR", "text in base64; send the bytes that it encodes"),
)
_AVIF = {b"avif", b"avis"}
_HEIC = {b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"hevm", b"hevs", b"mif1", b"msf1"}


def _foreign(data: bytes) -> str:
    """Say what `data` is, if it is none of FORMATS."""
    name = next((name for first, name in _FOREIGN if data.startswith(first)), None)
    if name is None and data[4:8] == b"ftyp":
        name = _of_brand(data)
    if name is None:
        text = data[:1024].removeprefix(b"\xef\xbb\xbf").lstrip().lower()
        if text.startswith((b"<!doctype html", b"<html")):
            name = "an HTML page"
        elif text.startswith(b"<") and b"<svg" in text:
            name = "an SVG image"
    return f"is not a {ACCEPTED} image" if name is None else f"is {name}; accepted are {ACCEPTED}"


def _of_brand(data: bytes) -> str:
    """Name a file of ISO's base media format by its brands: the major one, then those that it is compatible with."""
    length = min(int.from_bytes(data[:4]), 256)
    brands = [data[8:12], *(data[at : at + 4] for at in range(16, length, 4))]
    if _AVIF.intersection(brands):
        return "an AVIF image"
    if _HEIC.intersection(brands):
        return "a HEIC image"
    return "a video or another file in MPEG-4's container"
