"""Reduces an encoded image to the bytes that its pixels are made from.

Text, colour profiles, previews, EXIF and whatever follows the image never reach the decoder. However large, damaged or
hostile they are, they take no time, cause no refusal, and make no library warn. Only the orientation is read from EXIF,
here.
"""

import re
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass

from tome_server.errors import InvalidRequestError
from tome_server.models.images.exif import orientation
from tome_server.models.images.image_header import (
    END_OF_IMAGE,
    PNG_SIGNATURE,
    START_OF_SCAN,
    ImageHeader,
    cut_off,
    damaged,
    jpeg_segments,
)

MOST_SCANS = 64
"""Scans of a progressive JPEG. Encoders write about ten, and each is a pass over the whole image."""

MOST_CHUNKS = 65_536
"""Chunks of a PNG or WebP. A PNG of 16 MiB has about 2,000 from the usual encoders."""

_HIGHEST_DEFLATE_RATIO = 1032


@dataclass(frozen=True)
class BareImage:
    """An image of the same format and pixels, and nothing else."""

    data: bytes
    orientation: int
    """EXIF's orientation: 1 is upright."""
    whole: bool = True
    """False if the format's end is missing, so that the pixels may be cut off too."""


def bare(data: bytes, header: ImageHeader) -> BareImage:
    """Take the pixels out of an encoded image whose header has been read.

    Raises InvalidRequestError if what belongs to the pixels is damaged or cut off, or if the image is animated.
    """
    match header.format:
        case "JPEG":
            return _jpeg(data, header)
        case "PNG":
            return _png(data)
        case "WEBP":
            return _webp(data)
        case _:
            return BareImage(data, 1)


# ---- JPEG ----

_JFIF, _EXIF, _ADOBE, _COMMENT = 0xE0, 0xE1, 0xEE, 0xFE
_BESIDE = {*range(0xE0, 0xF0), _COMMENT} - {_JFIF, _ADOBE}  # those two say what the components mean
_AFTER_SCAN = re.compile(rb"\xff[^\x00\x01\xd0-\xd7\xff]")  # between pixels there are restarts, and 0xFF as data


def _jpeg(data: bytes, header: ImageHeader) -> BareImage:
    view = memoryview(data)
    kept = [view[:2]]
    exif = b""
    for segment in jpeg_segments(data):
        if segment.marker not in _BESIDE:
            kept.append(view[segment.start : segment.end])
        elif segment.marker == _EXIF and not exif and data.startswith(b"Exif\0\0", segment.body):
            exif = data[segment.body : segment.end]
    pixels = segment.end
    end = _end_of_scans(data, pixels)
    if end is None and header.kind != "JPEG":
        # Any number of scans makes a progressive image, each sharper than the one before it.
        raise cut_off("without the mark of a JPEG's end, and more of its pixels may be missing")
    kept.append(view[pixels:end])
    return BareImage(b"".join(kept), orientation(exif), whole=end is not None)


def _end_of_scans(data: bytes, at: int) -> int | None:
    """Return where a JPEG ends, the pixels of whose first scan begin at `at`; None if its end is missing."""
    scans = 1
    while found := _AFTER_SCAN.search(data, at):
        marker = data[found.end() - 1]
        if marker == END_OF_IMAGE:
            return found.end()
        if marker == START_OF_SCAN:
            scans += 1
            if scans > MOST_SCANS:
                raise InvalidRequestError("image", f"has more than {MOST_SCANS} scans; save it as a baseline JPEG")
        at = found.end() + max(2, int.from_bytes(data[found.end() : found.end() + 2]))
    return None


# ---- PNG ----

_CRITICAL = {b"IHDR", b"PLTE", b"IDAT", b"IEND"}
_CHANNELS = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}


@dataclass(frozen=True)
class _Chunk:
    name: bytes
    whole: memoryview
    """Including its length, name and check sum."""

    @property
    def body(self) -> memoryview:
        return self.whole[8:-4]

    @property
    def sound(self) -> bool:
        """Whether its check sum is right."""
        return zlib.crc32(self.whole[4:-4]) == int.from_bytes(self.whole[-4:])


def _chunks(data: bytes) -> Iterator[_Chunk]:
    """Yield the chunks after the first, IHDR. Raises InvalidRequestError if the file is cut off before its last pixels.

    If it is cut off later, it may be without its end; the decoder finds out whether pixels are missing.
    """
    view, at, pixels = memoryview(data), len(PNG_SIGNATURE) + 25, False
    for _ in range(MOST_CHUNKS):
        if len(data) < at + 8:
            if not pixels:
                raise cut_off("before its pixels")
            return
        length, name = struct.unpack_from(">I4s", data, at)
        end = at + 12 + length
        if end > len(data):
            if name == b"IDAT" or not pixels:
                raise cut_off(f"where {end - len(data):,} bytes or more are missing")
            return
        yield _Chunk(name, view[at:end])
        pixels |= name == b"IDAT" and length > 0
        at = end
    raise InvalidRequestError("image", f"has more than {MOST_CHUNKS:,} chunks; save it anew")


def _png(data: bytes) -> BareImage:
    width, height, depth, colour = struct.unpack_from(">IIBB", data, 16)
    kept: list[bytes | memoryview] = [memoryview(data)[: len(PNG_SIGNATURE) + 25]]
    exif = b""
    palette, compressed = False, 0
    for chunk in _chunks(data):
        name, body = chunk.name, chunk.body
        if name in _CRITICAL or name == b"tRNS":
            if not chunk.sound:
                raise damaged(f"the check sum of a chunk that belongs to its pixels, {name.decode()}, is wrong")
            if name == b"IEND":
                break
            if name == b"IDAT":
                compressed += len(body)
                kept.append(chunk.whole)
            elif not compressed and name != b"IHDR":
                palette |= name == b"PLTE"
                kept.append(_scaled(chunk.whole, depth) if (name, colour) == (b"tRNS", 0) else chunk.whole)
        elif not name.isalpha():
            raise damaged("there is something else where a PNG chunk must begin")
        elif name[:1].isupper():
            raise damaged(f"it has a PNG chunk that must be understood and isn't known, {name.decode()}")
        elif name == b"eXIf" and not exif and chunk.sound:
            exif = bytes(body)
        elif name == b"acTL" and not compressed and _frames(body) > 1 and chunk.sound:
            raise InvalidRequestError("image", "is animated; send one frame")
    if colour == 3 and not palette:
        raise damaged("its palette is missing")
    if compressed * _HIGHEST_DEFLATE_RATIO < width * height * _CHANNELS[colour] * depth // 8:
        raise cut_off("before its last pixel")
    kept.append(b"\0\0\0\0IEND\xaeB`\x82")
    return BareImage(b"".join(kept), orientation(exif))


def _frames(control: memoryview) -> int:
    """Return the number of frames that an animation's control chunk tells; 0 if it is too short."""
    return int.from_bytes(control[:4]) if len(control) >= 4 else 0


def _scaled(chunk: memoryview, depth: int) -> bytes | memoryview:
    """Scale a transparent grey of 2 or 4 bits to 8 bits, like the pixels that Pillow compares with it."""
    if depth not in (2, 4) or len(chunk) < 14:
        return chunk
    most = 2**depth - 1
    grey = (int.from_bytes(chunk[8:10]) & most) * 255 // most
    body = b"tRNS" + struct.pack(">H", grey)
    return struct.pack(">I", 2) + body + struct.pack(">I", zlib.crc32(body))


_ADAM7 = ((0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2))
"""The passes of an interlaced PNG: the first column and row, and the steps between columns and rows."""


def png_lacks_rows(data: bytes) -> bool:
    """Return whether the pixels of a bare PNG lack rows, though their compressed data ends properly."""
    width, height, depth, colour = struct.unpack_from(">IIBB", data, 16)
    passes = _ADAM7 if data[28] else ((0, 0, 1, 1),)
    sizes = ((-(-(width - left) // across), -(-(height - top) // down)) for left, top, across, down in passes)
    bits = _CHANNELS[colour] * depth
    missing: int = sum(rows * (1 + (columns * bits + 7) // 8) for columns, rows in sizes if columns > 0)
    view = memoryview(data)
    inflate = zlib.decompressobj()
    at = len(PNG_SIGNATURE)
    while missing > 0 and not inflate.eof and at < len(data):
        length, name = struct.unpack_from(">I4s", data, at)
        packed: bytes | memoryview = view[at + 8 : at + 8 + length] if name == b"IDAT" else b""
        while packed and missing > 0:
            missing -= len(inflate.decompress(packed, 2**20))
            packed = inflate.unconsumed_tail
        at += 12 + length
    return missing > 0


# ---- WebP ----

_WEBP_PIXELS = {b"VP8 ", b"VP8L", b"ALPH", b"ANIM", b"ANMF"}
_ANIMATION_AND_ALPHA = 0x12


def _webp(data: bytes) -> BareImage:
    if data[12:16] != b"VP8X":
        return BareImage(data, 1)  # the simple kind, which holds nothing but pixels
    view = memoryview(data)
    size = int.from_bytes(data[4:8], "little") + 8
    if data[16:20] != b"\x0a\0\0\0":
        raise damaged("its WebP header, VP8X, has another length than 10")
    kept: list[bytes | memoryview] = [view[12:20], bytes([data[20] & _ANIMATION_AND_ALPHA]), view[21:30]]
    at, frames, exif = 30, 0, b""
    for _ in range(MOST_CHUNKS):
        if at + 8 > size:
            break
        name, length = struct.unpack_from("<4sI", data, at)
        body, end = at + 8, at + 8 + length + length % 2
        if body + length > size:
            raise cut_off(f"where {body + length - size:,} bytes or more are missing")
        if name in _WEBP_PIXELS:
            kept.append(view[at:end])
        elif name == b"EXIF" and not exif:
            exif = bytes(view[body : body + length])
        frames += name == b"ANMF"
        at = end
    else:
        raise InvalidRequestError("image", f"has more than {MOST_CHUNKS:,} chunks; save it anew")
    if frames > 1:
        raise InvalidRequestError("image", "is animated; send one frame")
    chunks = b"".join(kept)
    return BareImage(b"RIFF" + struct.pack("<I", 4 + len(chunks)) + b"WEBP" + chunks, orientation(exif))
