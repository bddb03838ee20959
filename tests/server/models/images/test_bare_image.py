"""What lies beside the pixels is not read; what belongs to them must be sound; and colours are right either way."""

import contextlib
import io
import itertools
import logging
import random
import struct
import warnings
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image

from tome_server.errors import InvalidRequestError
from tome_server.models.images.bare_image import MOST_CHUNKS, MOST_SCANS
from tome_server.models.preprocess import Limits, Preprocess
from tome_server.models.transform import ImageSettings

SIZE = 48
AS_IT_IS = Preprocess(ImageSettings((3, SIZE, SIZE), (0.0,) * 3, (1.0,) * 3, "nearest", 1.0, "squash"), Limits())


def decoded(data: bytes) -> NDArray[np.uint8]:
    """The pixels of an image of the model's size, [H, W, C]."""
    return AS_IT_IS.encoded(data).transpose(1, 2, 0)


def refusal(data: bytes) -> str:
    with pytest.raises(InvalidRequestError) as caught:
        AS_IT_IS.encoded(data)
    assert caught.value.field == "image"
    return caught.value.description


def encode(image: Image.Image, kind: str, **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def photo(mode: str = "RGB") -> Image.Image:
    across, down = np.linspace(0, 255, SIZE), np.linspace(0, 255, SIZE)[:, None]
    pixels = np.stack([across + 0 * down, 0 * across + down, (across + down) / 2, across / 2 + down / 2], axis=-1)
    return Image.fromarray(pixels.astype(np.uint8), "RGBA").convert(mode)


RGB = np.asarray(photo())


# ---- PNG ----


def chunk(name: bytes, body: bytes, crc: int | None = None) -> bytes:
    return (
        struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body) if crc is None else crc)
    )


def png(*, before: bytes = b"", between: bytes = b"", after: bytes = b"", end: bytes = chunk(b"IEND", b"")) -> bytes:
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", SIZE, SIZE, 8, 2, 0, 0, 0))
    packed = zlib.compress(b"".join(b"\0" + row.tobytes() for row in RGB))
    pixels = chunk(b"IDAT", packed[:100]) + between + chunk(b"IDAT", packed[100:])
    return b"\x89PNG\r\n\x1a\n" + header + before + pixels + after + end


def text(name: bytes, length: int) -> bytes:
    packed = zlib.compress(bytes(length))
    return {
        b"tEXt": b"Comment\0" + bytes(length),
        b"zTXt": b"Comment\0\0" + packed,
        b"iTXt": b"Comment\0\1\0\0\0" + packed,
        b"iCCP": b"name\0\0" + packed,
    }[name]


BESIDE = {
    **{f"{name.decode()} of 2 MB": chunk(name, text(name, 2_000_000)) for name in (b"tEXt", b"zTXt", b"iTXt", b"iCCP")},
    "80 texts of 1 MB": chunk(b"iTXt", text(b"iTXt", 1_000_000)) * 80,
    "text of a wrong check sum": chunk(b"tEXt", b"Comment\0hello", crc=1),
    "EXIF of a wrong check sum": chunk(b"eXIf", b"II*\0\x08\0\0\0\1\0\x12\1\3\0\1\0\0\0\6\0\0\0", crc=1),
    "text that isn't packed": chunk(b"zTXt", b"Comment\0\0nonsense"),
    "text of an unknown method": chunk(b"zTXt", b"Comment\0\7nonsense"),
    "a profile that is none": chunk(b"iCCP", b""),
    "an empty chunk of each kind": b"".join(
        chunk(name, b"")
        for name in (b"gAMA", b"cHRM", b"sRGB", b"pHYs", b"tIME", b"eXIf", b"acTL", b"fcTL", b"fdAT", b"prVt", b"iCCP")
    ),
    "a frame's control without frames": chunk(b"fcTL", bytes(26)),
    "one frame": chunk(b"acTL", struct.pack(">II", 1, 0)),
    "a picture's gamma": chunk(b"gAMA", struct.pack(">I", 10)),
}


@pytest.mark.parametrize("beside", BESIDE.values(), ids=BESIDE)
@pytest.mark.parametrize("where", ["before", "between", "after"])
def test_what_lies_beside_the_pixels_of_a_png_is_not_read(where: str, beside: bytes) -> None:
    assert np.array_equal(decoded(png(**{where: beside})), RGB)


@pytest.mark.parametrize(
    "rest",
    [
        pytest.param(b"", id="no end"),
        pytest.param(chunk(b"IEND", b"") + b"junk" * 1000, id="junk after the end"),
        pytest.param(chunk(b"tEXt", b"Comment\0" + bytes(100))[:50], id="cut off in a text"),
        pytest.param(b"\0\0\0", id="cut off in a length"),
        pytest.param(chunk(b"PLTE", b"abc") + chunk(b"tRNS", b"\0" * 6) + chunk(b"IEND", b""), id="too late"),
    ],
)
def test_what_follows_the_pixels_of_a_png_does_not_matter(rest: bytes) -> None:
    assert np.array_equal(decoded(png(end=rest)), RGB)


def reframed(data: bytes, name: bytes, crc: int = 1) -> bytes:
    """The PNG with the check sum of its first chunk of that name overwritten."""
    at = data.index(name)
    end = at + 4 + int.from_bytes(data[at - 4 : at])
    return data[:end] + struct.pack(">I", crc) + data[end + 4 :]


PALETTE = encode(photo().quantize(200), "PNG", transparency=3)
COLOUR_KEY = encode(photo(), "PNG", transparency=(1, 2, 3))


@pytest.mark.parametrize(
    ("data", "says"),
    [
        pytest.param(reframed(png(), b"IHDR"), "is damaged: the check sum of its header, IHDR, is wrong", id="IHDR"),
        pytest.param(reframed(png(), b"IDAT"), "belongs to its pixels, IDAT, is wrong", id="IDAT"),
        pytest.param(reframed(PALETTE, b"PLTE"), "belongs to its pixels, PLTE, is wrong", id="PLTE"),
        pytest.param(reframed(COLOUR_KEY, b"tRNS"), "belongs to its pixels, tRNS, is wrong", id="tRNS"),
        pytest.param(PALETTE.replace(b"PLTE", b"plTE"), "is damaged: its palette is missing", id="no palette"),
        pytest.param(png(before=chunk(b"ABCD", b"")), "must be understood and isn't known, ABCD", id="unknown"),
        pytest.param(
            png(before=b"\0\0\0\0\xff\xfe\xfd\xfc" + bytes(4)), "is damaged: there is something else", id="junk"
        ),
        pytest.param(png(before=b"\x7f\0\0\0tEXt" + bytes(99)), "is cut off: it ends where", id="a text of 2 GB"),
        pytest.param(png()[:200], "is cut off: it ends where", id="cut off in the pixels"),
        pytest.param(png()[:40], "is cut off: it ends before its pixels", id="cut off before the pixels"),
        pytest.param(
            png(before=chunk(b"acTL", struct.pack(">II", 2, 0))), "is animated; send one frame", id="animated"
        ),
        pytest.param(
            png(before=chunk(b"tEXt", b"") * MOST_CHUNKS), "has more than 65,536 chunks; save it anew", id="many chunks"
        ),
    ],
)
def test_what_belongs_to_the_pixels_of_a_png_must_be_sound(data: bytes, says: str) -> None:
    assert says in refusal(data)


def test_a_png_too_short_for_its_size_is_refused_before_memory_is_taken_for_it() -> None:
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 7000, 7000, 8, 6, 0, 0, 0))
    data = b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(bytes(10**6))) + chunk(b"IEND", b"")
    assert refusal(data) == "is cut off: it ends before its last pixel"


@pytest.mark.parametrize("interlaced", [False, True])
@pytest.mark.parametrize("colour", [0, 2, 3, 6])
@pytest.mark.parametrize("shade", [0, 200])
def test_a_png_whose_pixels_end_early_in_good_order_is_cut_off(shade: int, colour: int, interlaced: bool) -> None:
    channels = {0: 1, 2: 3, 3: 1, 6: 4}[colour]
    passes = [(SIZE, SIZE)]
    if interlaced:
        passes = [(6, 6), (6, 6), (12, 6), (12, 12), (24, 12), (24, 24), (48, 24)]
    rows = [b"\0" + bytes([shade]) * (columns * channels) for columns, count in passes for _ in range(count)]

    def data(rows: list[bytes]) -> bytes:
        header = chunk(b"IHDR", struct.pack(">IIBBBBB", SIZE, SIZE, 8, colour, 0, 0, interlaced))
        palette = chunk(b"PLTE", bytes(768)) if colour == 3 else b""
        return b"\x89PNG\r\n\x1a\n" + header + palette + chunk(b"IDAT", zlib.compress(b"".join(rows)))

    assert decoded(data(rows)).shape == (SIZE, SIZE, 3)
    for missing in (1, 10, len(rows) - 1):
        assert refusal(data(rows[:-missing])) == "is cut off: it ends before its last pixel"


DEPTHS = [
    (depth, colour) for colour, depths in {0: (1, 2, 4, 8, 16), 2: (8, 16), 3: (1, 2, 4, 8)}.items() for depth in depths
]


@pytest.mark.parametrize(("depth", "colour"), DEPTHS)
def test_a_transparent_colour_is_white_and_no_other_is(depth: int, colour: int) -> None:
    """Two halves of colours that differ as little as they can, the first of them transparent."""
    low = 0 if depth == 1 else 2
    first, second = ([low] * (2 if colour == 2 else 0) + [value] for value in (low, low + 1))
    bits = "".join(f"{sample:0{depth}b}" for pixel in [first] * 24 + [second] * 24 for sample in pixel)
    row = b"\0" + int(bits, 2).to_bytes(len(bits) // 8)
    if colour == 3:
        beside = chunk(b"PLTE", bytes(range(3 * min(2**depth, 16)))) + chunk(b"tRNS", bytes([255] * low + [0]))
        expected = [3 * second[0], 3 * second[0] + 1, 3 * second[0] + 2]
    else:
        beside = chunk(b"tRNS", struct.pack(f">{len(first)}H", *first))
        expected = [int(sample * 255 / (2**depth - 1)) for sample in second] * (3 // len(second))
    data = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", SIZE, SIZE, depth, colour, 0, 0, 0)) + beside
    got = decoded(data + chunk(b"IDAT", zlib.compress(row * SIZE)) + chunk(b"IEND", b""))
    assert (got[:, :24] == 255).all()
    assert (got[:, 24:] == expected).all()


@given(st.integers(0, 7), st.integers(0, 7), st.integers(0, 7))
def test_a_transparent_colour_of_16_bits_is_that_colour_alone(red: int, green: int, blue: int) -> None:
    values = (np.random.default_rng(0).integers(0, 8, (SIZE, SIZE, 3)) * 0x81).astype(">u2")
    key = np.array([red, green, blue]) * 0x81
    data = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", SIZE, SIZE, 16, 2, 0, 0, 0))
    data += chunk(b"tRNS", struct.pack(">HHH", *key)) + chunk(
        b"IDAT", zlib.compress(b"".join(b"\0" + row.tobytes() for row in values))
    )
    expected = np.where((values == key).all(axis=-1, keepdims=True), 255, values >> 8)
    assert np.array_equal(decoded(data + chunk(b"IEND", b"")), expected)


# ---- JPEG ----

JPEG = encode(photo(), "JPEG", quality=95)
PLAIN = decoded(JPEG)


def segment(marker: int, body: bytes) -> bytes:
    return b"\xff" + bytes([marker]) + struct.pack(">H", 2 + len(body)) + body


def exif(*entries: tuple[int, int, int, bytes], more: bytes = b"") -> bytes:
    return (
        b"Exif\0\0II*\0\x08\0\0\0"
        + struct.pack("<H", len(entries))
        + b"".join(struct.pack("<HHI4s", *entry) for entry in entries)
        + more
    )


OUTSIDE = exif(*[(tag, 5, 1000, b"\xff\xff\xff\x7f") for tag in range(0x8000, 0x8000 + 5000)])
THUMBNAIL = exif(
    (0x0112, 3, 1, b"\1\0\0\0"), more=struct.pack("<I", 0) + encode(Image.new("RGB", (9, 9), "red"), "JPEG")
)

JPEG_BESIDE = {
    "EXIF whose entries lead nowhere": segment(0xE1, OUTSIDE),
    "EXIF that is none": segment(0xE1, b"Exif\0\0nonsense"),
    "EXIF of nothing": segment(0xE1, b"Exif\0\0"),
    "a preview": segment(0xE1, THUMBNAIL),
    "XMP with an orientation": segment(0xE1, b'http://ns.adobe.com/xap/1.0/\0<x tiff:Orientation="6"/>'),
    "a broken profile": segment(0xE2, b"ICC_PROFILE\0\7\7nonsense"),
    "a broken index of pictures": segment(0xE2, b"MPF\0nonsense"),
    "broken Photoshop blocks": segment(0xED, b"Photoshop 3.0\0" + b"8BIM\x03\xed" * 50),
    "a comment of 64 KB": segment(0xFE, bytes(65533)),
    "a JFIF of a broken density": segment(0xE0, b"JFIF\0\1\1"),
    "each segment for applications": b"".join(segment(0xE0 + kind, b"\0") for kind in range(1, 14)),
    "fill bytes": b"\xff" * 500,
}


@pytest.mark.parametrize("beside", JPEG_BESIDE.values(), ids=JPEG_BESIDE)
def test_what_lies_beside_the_pixels_of_a_jpeg_is_not_read(beside: bytes) -> None:
    assert np.array_equal(decoded(JPEG[:20] + beside + JPEG[20:]), PLAIN)
    assert np.array_equal(decoded(JPEG[:2] + beside + JPEG[2:]), PLAIN)


@pytest.mark.parametrize("other", [(0x0128, 2, 4, b"abc\0"), (0x011A, 2, 4, b"72\0\0"), (0x8769, 4, 1, b"\xff" * 4)])
def test_an_odd_tag_beside_it_does_not_keep_orientation_from_being_honoured(other: tuple[int, int, int, bytes]) -> None:
    turned = JPEG[:2] + segment(0xE1, exif((0x0112, 3, 1, b"\6\0\0\0"), other)) + JPEG[2:]
    assert np.array_equal(decoded(turned), np.rot90(PLAIN, -1))


@pytest.mark.parametrize("rest", [b"junk" * 100, JPEG, b"\xff\xd9"], ids=["junk", "another JPEG", "another end"])
def test_what_follows_the_end_of_a_jpeg_does_not_matter(rest: bytes) -> None:
    assert np.array_equal(decoded(JPEG + rest), PLAIN)


def test_a_jpeg_without_its_end_is_accepted_if_its_pixels_are_whole() -> None:
    assert np.array_equal(decoded(JPEG[:-2]), PLAIN)
    assert np.array_equal(decoded(JPEG[:-1]), PLAIN)


ENTROPY = JPEG.index(b"\xff\xda") + 14


@pytest.mark.parametrize("options", [{}, {"restart_marker_blocks": 1}, {"subsampling": 0}], ids=str)
def test_a_jpeg_cut_off_in_its_pixels_is_refused_wherever_it_is_cut(options: dict[str, int]) -> None:
    data = encode(photo(), "JPEG", quality=95, **options)
    whole = decoded(data)
    for length in range(data.index(b"\xff\xda") + 14, len(data) - 2):
        try:
            got = decoded(data[:length])
        except InvalidRequestError as error:
            says = error.description
        else:
            # A decoder may make up the last bits as they were.
            assert length > len(data) - 6
            assert np.array_equal(got, whole)
            continue
        assert says.startswith("is cut off: it ends ")


def test_a_progressive_jpeg_without_its_end_is_refused_for_more_detail_may_be_missing() -> None:
    data = encode(photo(), "JPEG", progressive=True)
    assert "without the mark of a JPEG's end" in refusal(data[:-2])
    assert "without the mark of a JPEG's end" in refusal(data[: data.rindex(b"\xff\xda")])


def test_a_jpeg_of_more_scans_than_any_encoder_writes_is_refused() -> None:
    data = encode(photo(), "JPEG", progressive=True)
    last, end = data.rindex(b"\xff\xda"), len(data) - 2
    assert np.array_equal(decoded(data[:end] + data[last:end] * 40 + data[end:]).shape, (SIZE, SIZE, 3))
    many = data[:end] + data[last:end] * MOST_SCANS + data[end:]
    assert refusal(many) == f"has more than {MOST_SCANS} scans; save it as a baseline JPEG"


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
@pytest.mark.parametrize("progressive", [False, True])
@pytest.mark.parametrize("orientation", [1, 6])
def test_jpegs_of_every_kind_are_decoded_at_the_scale_that_is_needed(
    mode: str, progressive: bool, orientation: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    large = photo("RGB").resize((SIZE * 9, SIZE * 8)).convert(mode)
    tag = Image.Exif()
    tag[0x0112] = orientation
    data = encode(large, "JPEG", quality=95, progressive=progressive, exif=tag)
    sizes = []
    load = Image.Image.load
    monkeypatch.setattr(Image.Image, "load", lambda image: sizes.append(image.size) or load(image))
    got = decoded(data)
    assert sizes[0] == (SIZE * 9 // 8, SIZE)
    full = AS_IT_IS.image(Image.open(io.BytesIO(data))).transpose(1, 2, 0)
    assert np.abs(got.astype(int) - full).mean() < 4


@pytest.mark.parametrize("adobe", [None, 0, 1, 2])
@pytest.mark.parametrize("mode", ["RGB", "YCbCr", "CMYK"])
def test_the_segments_that_say_what_components_mean_are_kept(mode: str, adobe: int | None) -> None:
    data = encode(photo("RGB").convert(mode), "JPEG", quality=95)
    first = 2 if data[2:4] == b"\xff\xee" else 20
    if data[first : first + 2] == b"\xff\xee":
        data = data[:first] + data[first + 16 :]
    if adobe is not None:
        data = data[:first] + segment(0xEE, b"Adobe\0\x64\0\0\0\0" + bytes([adobe])) + data[first:]
    image = Image.open(io.BytesIO(data))
    assert np.array_equal(decoded(data), np.asarray(image.convert("RGB")))


# ---- WebP ----

WEBP = encode(photo(), "WEBP", lossless=True, icc_profile=b"profile", exif=exif(), xmp=b"<x/>")


def riff(*chunks: bytes) -> bytes:
    body = b"WEBP" + b"".join(chunks)
    return b"RIFF" + struct.pack("<I", len(body)) + body


def piece(name: bytes, body: bytes) -> bytes:
    return name + struct.pack("<I", len(body)) + body + bytes(len(body) % 2)


def webp_chunk(data: bytes, name: bytes) -> bytes:
    at = data.index(name)
    length = int.from_bytes(data[at + 4 : at + 8], "little")
    return data[at : at + 8 + length + length % 2]


HEAD, PIXELS = webp_chunk(WEBP, b"VP8X"), webp_chunk(WEBP, b"VP8L")


@pytest.mark.parametrize(
    "chunks",
    [
        pytest.param([HEAD, PIXELS], id="nothing"),
        pytest.param(
            [HEAD, piece(b"ICCP", b"nonsense"), PIXELS, piece(b"EXIF", b"x"), piece(b"XMP ", b"")], id="broken"
        ),
        pytest.param([HEAD, PIXELS, piece(b"EXIF", OUTSIDE)], id="EXIF whose entries lead nowhere"),
        pytest.param([HEAD, piece(b"ABCD", bytes(9999)), PIXELS, piece(b"EFGH", b"")], id="unknown chunks"),
        pytest.param([HEAD, *[piece(b"ABCD", b"")] * 50, PIXELS, *[piece(b"ABCD", b"")] * 9999], id="many chunks"),
    ],
)
def test_what_lies_beside_the_pixels_of_a_webp_is_not_read(chunks: list[bytes]) -> None:
    assert np.array_equal(decoded(riff(*chunks)), RGB)
    assert np.array_equal(decoded(riff(*chunks) + b"junk"), RGB)


@pytest.mark.parametrize("prefix", [b"", b"Exif\0\0"])
def test_the_orientation_of_a_webp_is_honoured_with_and_without_exifs_prefix(prefix: bytes) -> None:
    tag = exif((0x0112, 3, 1, b"\3\0\0\0"), (0x0128, 2, 4, b"abc\0")).removeprefix(b"Exif\0\0")
    assert np.array_equal(decoded(riff(HEAD, PIXELS, piece(b"EXIF", prefix + tag))), RGB[::-1, ::-1])


def test_a_webp_keeps_its_alpha() -> None:
    image = photo("RGBA")
    for lossless in (True, False):
        data = encode(image, "WEBP", lossless=lossless, quality=100, exact=True, xmp=b"<x/>")
        white = Image.new("RGBA", image.size, "white")
        expected = np.asarray(Image.alpha_composite(white, Image.open(io.BytesIO(data)).convert("RGBA")).convert("RGB"))
        assert np.array_equal(decoded(data), expected)


def test_an_animation_of_one_frame_is_a_picture_and_of_two_is_none() -> None:
    other = photo().transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    data = encode(photo(), "WEBP", lossless=True, save_all=True, append_images=[other])
    assert refusal(data) == "is animated; send one frame"
    head, animation, frame = (webp_chunk(data, name) for name in (b"VP8X", b"ANIM", b"ANMF"))
    assert np.array_equal(decoded(riff(head, animation, frame)), RGB)


@pytest.mark.parametrize(
    ("data", "says"),
    [
        pytest.param(riff(HEAD, PIXELS[:-40]), "is cut off: it ends where", id="cut off in the pixels"),
        pytest.param(riff(piece(b"VP8X", HEAD[8:] + b"ab"), PIXELS), "another length than 10", id="a long header"),
        pytest.param(riff(HEAD, PIXELS[:60] + bytes(len(PIXELS) - 60)), "is damaged: its pixels", id="broken pixels"),
        pytest.param(riff(HEAD, PIXELS, *[piece(b"ABCD", b"")] * MOST_CHUNKS), "more than 65,536 chunks", id="many"),
        pytest.param(riff(HEAD[:12] + b"\x05\0\0\x05\0\0" + HEAD[18:], PIXELS), "is damaged", id="another canvas"),
    ],
)
def test_what_belongs_to_the_pixels_of_a_webp_must_be_sound(data: bytes, says: str) -> None:
    assert says in refusal(data)


# ---- BMP ----


def bmp(
    rows: bytes, bits: int, *, compression: int = 0, masks: tuple[int, ...] = (), up: bool = True, size: int = 40
) -> bytes:
    palette = bytes(itertools.chain.from_iterable((n, n, 0, 0) for n in range(2**bits))) if bits <= 8 else b""
    header = struct.pack("<IiiHHIIiiII", size, SIZE, SIZE if up else -SIZE, 1, bits, compression, 0, 0, 0, 0, 0)
    header += struct.pack(f"<{len(masks)}I", *masks)
    header += bytes(max(0, size - len(header)))
    offset = 14 + len(header) + len(palette)
    return b"BM" + struct.pack("<IHHI", 0, 0, 0, offset) + header + palette + rows


BGR = RGB[..., ::-1]
BGRA = np.dstack([BGR, np.full((SIZE, SIZE), 128)]).astype(np.uint8)
ON_WHITE = np.rint(RGB * (128 / 255) + 127).astype(np.uint8)
FIVE = RGB.astype(np.uint16) >> 3
SIXTEEN = (FIVE[..., 0] << 10 | FIVE[..., 1] << 5 | FIVE[..., 2]).astype("<u2")
INDEX = RGB[..., 2]
RUNS = b"".join(b"".join(bytes([1, value]) for value in row) + b"\0\0" for row in INDEX[::-1]) + b"\0\1"


@pytest.mark.parametrize(
    ("data", "expected", "within"),
    [
        pytest.param(bmp(BGR[::-1].tobytes(), 24), RGB, 0, id="24 bits"),
        pytest.param(bmp(BGR.tobytes(), 24, up=False), RGB, 0, id="24 bits from the top"),
        pytest.param(bmp(BGRA[::-1].tobytes(), 32), RGB, 0, id="32 bits, the last of them unused"),
        pytest.param(
            bmp(BGRA[::-1].tobytes(), 32, compression=3, masks=(0xFF0000, 0xFF00, 0xFF, 0xFF000000), size=108),
            ON_WHITE, 1, id="32 bits with alpha",
        ),
        pytest.param(
            bmp(BGRA[::-1].tobytes(), 32, compression=3, masks=(0xFF0000, 0xFF00, 0xFF)), RGB, 0, id="32 bits by masks"
        ),
        pytest.param(bmp(SIXTEEN[::-1].tobytes(), 16), RGB, 8, id="16 bits"),
        pytest.param(
            bmp(SIXTEEN[::-1].tobytes(), 16, compression=3, masks=(0x7C00, 0x3E0, 0x1F)), RGB, 8, id="16 bits by masks"
        ),
        pytest.param(bmp(INDEX[::-1].tobytes(), 8), INDEX[..., None] * [0, 1, 1], 0, id="8 bits"),
        pytest.param(
            bmp(RUNS, 8, compression=1),
            INDEX[..., None] * [0, 1, 1], 0, id="run lengths",
        ),
    ],
)  # fmt: skip
def test_bmps_of_every_kind_keep_their_colours(data: bytes, expected: NDArray[np.uint8], within: int) -> None:
    assert np.abs(decoded(data).astype(int) - expected).max() <= within


def test_a_large_run_length_encoded_bmp_is_refused() -> None:
    data = bytearray(bmp(b"\0\1", 8, compression=1))
    data[18:26] = struct.pack("<ii", 2001, 2000)
    assert "is a run-length encoded BMP of 2001×2000 pixels; at most 4,000,000" in refusal(bytes(data))


# ---- all of them ----


def test_an_image_that_takes_more_memory_than_one_may_is_refused_by_its_header() -> None:
    data = bytearray(encode(photo(), "WEBP", xmp=b"<x/>"))
    data[24:30] = struct.pack("<I", 4999)[:3] * 2
    says = refusal(bytes(data))
    assert says.startswith("is a WebP of 5000×5000 pixels, which takes ")
    assert says.endswith("at most 320 MiB are given to one image; send it smaller, or as a baseline JPEG")


def test_no_image_makes_a_library_log_or_warn(
    caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    caplog.set_level(logging.DEBUG)
    bad = [JPEG[:2] + beside + JPEG[2:] for beside in JPEG_BESIDE.values()]
    bad += [png(before=beside, after=beside) for beside in BESIDE.values()]
    bad += [riff(HEAD, PIXELS, piece(b"EXIF", OUTSIDE)), JPEG[:-40], png()[:-40], WEBP[:-40], PALETTE]
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        for data in bad:
            with contextlib.suppress(InvalidRequestError):
                decoded(data)
    assert not warned
    assert not [record for record in caplog.records if record.name.startswith("PIL")]
    assert capfd.readouterr().err == ""


@settings(max_examples=300, deadline=None)
@given(st.sampled_from(["JPEG", "PNG", "WEBP"]), st.integers(0, 2**32), st.integers(1, 40))
def test_noise_in_what_lies_beside_the_pixels_changes_nothing(kind: str, seed: int, edits: int) -> None:
    chance = random.Random(seed)
    noise = bytes(chance.choices(range(256), k=edits * 9))
    body = bytearray(exif((0x0112, 3, 1, b"\1\0\0\0"), (0x011A, 5, 1, bytes(4)), more=bytes(60)))
    for _ in range(edits):
        body[chance.randrange(30, len(body))] = chance.randrange(256)
    if kind == "JPEG":
        data = JPEG[:2] + segment(0xE1, bytes(body)) + segment(chance.choice([0xE2, 0xED, 0xFE]), noise) + JPEG[2:]
        assert np.array_equal(decoded(data), PLAIN)
    elif kind == "PNG":
        name = chance.choice([b"iCCP", b"iTXt", b"zTXt", b"tEXt", b"pHYs", b"sRGB", b"gAMA", b"fcTL", b"fdAT"])
        data = png(before=chunk(name, noise) + chunk(b"eXIf", bytes(body[6:])), after=chunk(name, noise))
        assert np.array_equal(decoded(data), RGB)
    else:
        data = riff(HEAD, piece(b"ICCP", noise), PIXELS, piece(b"EXIF", bytes(body)), piece(b"XMP ", noise))
        assert np.array_equal(decoded(data), RGB)
