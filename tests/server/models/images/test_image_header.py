import io
import struct
import sys
import zlib

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from tome_server.errors import InvalidRequestError
from tome_server.models.images.image_header import FORMATS, read_header

MODES = {
    "JPEG": ("1", "L", "RGB", "CMYK", "YCbCr"),
    "PNG": ("1", "L", "LA", "P", "RGB", "RGBA", "I;16"),
    "WEBP": ("L", "LA", "P", "RGB", "RGBA"),
    "BMP": ("1", "L", "P", "RGB", "RGBA"),
}


def encode(image: Image.Image, kind: str, **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def refusal(data: bytes) -> str:
    with pytest.raises(InvalidRequestError) as caught:
        read_header(data)
    assert caught.value.field == "image"
    return caught.value.description


@st.composite
def images(draw: st.DrawFn) -> bytes:
    kind = draw(st.sampled_from(FORMATS))
    image = Image.new(draw(st.sampled_from(MODES[kind])), (draw(st.integers(1, 300)), draw(st.integers(1, 300))))
    options: dict[str, object] = {}
    if kind == "JPEG":
        options = {"progressive": draw(st.booleans()), "icc_profile": draw(st.sampled_from([None, bytes(200_000)]))}
    if kind == "WEBP":
        options = {"lossless": draw(st.booleans()), "xmp": draw(st.sampled_from([b"", b"<x/>"]))}
    return encode(image, kind, **options)


@settings(max_examples=300, deadline=None)
@given(images())
def test_the_header_says_what_pillow_says(data: bytes) -> None:
    header = read_header(data)
    image = Image.open(io.BytesIO(data))
    assert (header.format, header.width, header.height) == (image.format, *image.size)
    assert header.encoded_bytes == len(data)


RGB = Image.linear_gradient("L").convert("RGB")


@pytest.mark.parametrize(
    ("data", "kind"),
    [
        (encode(RGB, "JPEG"), "JPEG"),
        (encode(RGB, "JPEG", progressive=True), "progressive JPEG"),
        (encode(RGB, "PNG"), "PNG"),
        (encode(RGB.convert("L").convert("I;16"), "PNG"), "16-bit PNG"),
        (encode(RGB, "WEBP"), "WebP"),
        (encode(RGB, "WEBP", xmp=b"<x/>"), "WebP"),
        (encode(RGB, "WEBP", lossless=True), "lossless WebP"),
        (encode(RGB, "WEBP", lossless=True, xmp=b"<x/>"), "lossless WebP"),
        (encode(RGB, "WEBP", lossless=True, save_all=True, append_images=[RGB.rotate(90)]), "lossless WebP"),
        (encode(RGB, "BMP"), "BMP"),
    ],
)
def test_images_whose_decoding_costs_alike_are_of_one_kind(data: bytes, kind: str) -> None:
    assert read_header(data).kind == kind


@pytest.mark.parametrize(
    ("size", "kind"),
    [
        ((600, 400), "JPEG"),
        ((496, 496), "JPEG at 1/2"),
        ((4000, 991), "JPEG at 1/2"),
        ((992, 4000), "JPEG at 1/4"),
        ((4000, 3000), "JPEG at 1/8"),
    ],
)
def test_decode_time_of_a_jpeg_is_learned_by_its_scale_too(size: tuple[int, int], kind: str) -> None:
    data = encode(Image.new("L", size), "JPEG")
    header = read_header(data)
    assert header.kind_at(248) == kind
    image = Image.open(io.BytesIO(data))
    image.draft(None, (248, 248))
    assert image.size == tuple(-(-side // header.scale(248)) for side in size)
    assert read_header(encode(Image.new("L", size), "PNG")).kind_at(248) == "PNG"


def ihdr(width: int, height: int, depth: int = 8, colour: int = 2, *ends: int) -> bytes:
    body = b"IHDR" + struct.pack(">IIBB", width, height, depth, colour) + bytes(ends or (0, 0, 0))
    return b"\x89PNG\r\n\x1a\n\0\0\0\x0d" + body + struct.pack(">I", zlib.crc32(body))


def bmp(width: int, height: int, *, bits: int = 24, compression: int = 0, size: int = 40, rest: bytes = b"") -> bytes:
    header = struct.pack("<IiiHHIIiiII", size, width, height, 1, bits, compression, 0, 0, 0, 0, 0)
    return b"BM" + struct.pack("<IHHI", 54, 0, 0, 54) + header + bytes(size - 40 if size > 40 else 0) + rest


def os2_bmp(width: int, height: int) -> bytes:
    """The oldest kind, whose header has 12 bytes."""
    return (
        b"BM"
        + struct.pack("<IHHIIHHHH", 0, 0, 0, 26, 12, width, height, 1, 24)
        + bytes((3 * width + 3) // 4 * 4 * height)
    )


@pytest.mark.parametrize(
    ("data", "size", "kind"),
    [
        pytest.param(ihdr(9, 5, 8, 2, 0, 0, 1), (9, 5), "interlaced PNG", id="interlaced PNG"),
        pytest.param(ihdr(9, 5, 16, 6, 0, 0, 1), (9, 5), "interlaced 16-bit PNG", id="interlaced 16-bit PNG"),
        pytest.param(ihdr(2**31 - 1, 1), (2**31 - 1, 1), "PNG", id="widest PNG"),
        pytest.param(bmp(3, -2, rest=bytes(24)), (3, 2), "BMP", id="BMP from the top"),
        pytest.param(os2_bmp(7, 5), (7, 5), "BMP", id="OS/2 BMP"),
        pytest.param(bmp(300, 200, bits=8, compression=1), (300, 200), "RLE BMP", id="RLE8"),
        pytest.param(bmp(300, 200, bits=4, compression=2), (300, 200), "RLE BMP", id="RLE4"),
    ],
)
def test_headers_that_pillow_never_writes_are_read(data: bytes, size: tuple[int, int], kind: str) -> None:
    header = read_header(data)
    assert (header.width, header.height, header.kind) == (*size, kind)
    assert header.megapixels == size[0] * size[1] / 1e6


def ftyp(*brands: bytes) -> bytes:
    box = b"ftyp" + brands[0] + bytes(4) + b"".join(brands)
    return struct.pack(">I", 4 + len(box)) + box + bytes(64)


@pytest.mark.parametrize(
    ("data", "name"),
    [
        pytest.param(encode(RGB, "GIF"), "a GIF image", id="GIF"),
        pytest.param(encode(RGB, "TIFF"), "a TIFF image", id="TIFF"),
        pytest.param(encode(RGB, "TIFF", big_tiff=True), "a TIFF image", id="BigTIFF"),
        pytest.param(b"MM\0*\0\0\0\x08" + bytes(40), "a TIFF image", id="big-endian TIFF"),
        pytest.param(encode(RGB, "AVIF"), "an AVIF image", id="AVIF"),
        pytest.param(ftyp(b"mif1", b"mif1", b"avif"), "an AVIF image", id="AVIF of the general brand"),
        pytest.param(ftyp(b"heic", b"mif1"), "a HEIC image", id="HEIC"),
        pytest.param(ftyp(b"mif1", b"heic"), "a HEIC image", id="HEIC of the general brand"),
        pytest.param(ftyp(b"isom", b"mp41"), "a video", id="MPEG-4"),
        pytest.param(encode(RGB, "JPEG2000"), "a JPEG 2000 image", id="JPEG 2000"),
        pytest.param(encode(RGB, "JPEG2000", no_jp2=True), "a JPEG 2000 image", id="JPEG 2000 codestream"),
        pytest.param(b"\xff\x0a" + bytes(40), "a JPEG XL image", id="JPEG XL codestream"),
        pytest.param(b"\0\0\0\x0cJXL \r\n\x87\n" + bytes(40), "a JPEG XL image", id="JPEG XL"),
        pytest.param(encode(RGB, "ICO"), "an ICO image", id="ICO"),
        pytest.param(encode(RGB, "PDF"), "a PDF document", id="PDF"),
        pytest.param(b'\xef\xbb\xbf<?xml version="1.0"?>\n<svg width="1"/>', "an SVG image", id="SVG"),
        pytest.param(b"\n<!DOCTYPE html><title>404</title><svg/>", "an HTML page", id="HTML"),
        pytest.param(
            b"\x89PNG\n\x1a\n\0\0\0\rIHDR", "a PNG image whose first bytes are damaged", id="PNG sent as text"
        ),
        pytest.param(b"/9j/4AAQSkZJRg", "text in base64", id="base64 of a JPEG"),
        pytest.param(b"data:image/png;base64,iVBO", "a data URL", id="data URL"),
    ],
)
def test_an_image_of_another_format_is_refused_by_its_name(data: bytes, name: str) -> None:
    says = refusal(data)
    assert says.startswith(f"is {name}")
    assert says.endswith("accepted are JPEG, PNG, WEBP or BMP")


JPEG = encode(RGB, "JPEG")
SOF = JPEG.index(b"\xff\xc0")
PNG = encode(RGB, "PNG")
WEBP = encode(RGB, "WEBP", xmp=b"<x/>")
SEGMENT = b"\xff\xe5\0\x02"


def changed(data: bytes, at: int, new: bytes) -> bytes:
    return data[:at] + new + data[at + len(new) :]


@pytest.mark.parametrize(
    ("data", "says"),
    [
        pytest.param(b"", "is empty", id="nothing"),
        pytest.param(b"\0" * 5000, "is not a JPEG, PNG, WEBP or BMP image", id="zeros"),
        pytest.param(b"no image at all", "is not a JPEG, PNG, WEBP or BMP image", id="text"),
        pytest.param(JPEG[:20], "is cut off: it ends before its pixels", id="JPEG cut in its header"),
        pytest.param(JPEG[:3], "is cut off: it ends before its pixels", id="three bytes of a JPEG"),
        pytest.param(JPEG[:SOF] + b"\xff\xd9", "is damaged: it is a JPEG without pixels", id="JPEG without pixels"),
        pytest.param(changed(JPEG, SOF + 5, b"\0\0"), "is 256×0 pixels", id="JPEG of no height"),
        pytest.param(changed(JPEG, SOF + 7, b"\0\0"), "is 0×256 pixels", id="JPEG of no width"),
        pytest.param(changed(JPEG, SOF + 4, b"\x0c"), "is a JPEG of 12 bits a sample", id="12-bit JPEG"),
        pytest.param(changed(JPEG, SOF + 9, b"\x02"), "is a JPEG of 2 components", id="JPEG of two components"),
        pytest.param(changed(JPEG, SOF + 11, b"\x00"), "impossible sampling factor", id="JPEG without sampling"),
        pytest.param(changed(JPEG, SOF + 1, b"\xc3"), "lossless, arithmetic-coded or hierarchical", id="lossless JPEG"),
        pytest.param(changed(JPEG, SOF + 1, b"\xc9"), "lossless, arithmetic-coded", id="arithmetic JPEG"),
        pytest.param(changed(JPEG, SOF + 1, b"\xec"), "doesn't say its size", id="JPEG without a size"),
        pytest.param(JPEG[:SOF] + JPEG[SOF : SOF + 19] + JPEG[SOF:], "of two sizes", id="JPEG of two sizes"),
        pytest.param(changed(JPEG, SOF + 2, b"\0\x01"), "impossible length", id="JPEG segment of length 1"),
        pytest.param(JPEG[:20] + bytes(9999) + JPEG[20:], "something else where a JPEG segment", id="JPEG with a hole"),
        pytest.param(JPEG[:2] + SEGMENT * 600 + JPEG[2:], "has more than 512 segments", id="JPEG of many segments"),
        pytest.param(ihdr(0, 5), "is 0×5 pixels", id="PNG of no width"),
        pytest.param(ihdr(5, 0), "is 5×0 pixels", id="PNG of no height"),
        pytest.param(ihdr(5, 5, 3), "no PNG of colour type 2 with 3 bits", id="PNG of three bits"),
        pytest.param(ihdr(5, 5, 8, 5), "no PNG of colour type 5", id="PNG of colour type 5"),
        pytest.param(ihdr(5, 5, 8, 2, 0, 0, 2), "method that doesn't exist", id="PNG of another interlacing"),
        pytest.param(
            changed(PNG, 30, b"abc"), "check sum of its header, IHDR, is wrong", id="PNG of a wrong check sum"
        ),
        pytest.param(changed(PNG, 12, b"CgBI"), "doesn't begin with its header", id="PNG for iOS"),
        pytest.param(PNG[:20], "is cut off: it ends in its header", id="PNG cut in its header"),
        pytest.param(WEBP[:20], "is cut off: it ends in its header", id="WebP cut in its header"),
        pytest.param(WEBP[:-9], "is cut off: it ends after", id="WebP cut"),
        pytest.param(changed(WEBP, 12, b"ABCD"), "first chunk is of no known type", id="WebP of another chunk"),
        pytest.param(changed(WEBP, 30, b"ABCD"), "is damaged: it is a WebP without pixels", id="WebP without pixels"),
        pytest.param(bmp(0, 10), "is 0×10 pixels", id="BMP of no width"),
        pytest.param(bmp(-3, 10), "is -3×10 pixels", id="BMP of a negative width"),
        pytest.param(bmp(10, 10), "is cut off: it ends after 54 of", id="BMP cut"),
        pytest.param(bmp(10, 10)[:40], "is cut off: it ends in its header", id="BMP cut in its header"),
        pytest.param(bmp(10, 10, size=41), "no BMP header of 41 bytes", id="BMP of another header"),
        pytest.param(bmp(10, 10, compression=4), "is a BMP of compression 4 with 24 bits", id="BMP that holds a JPEG"),
        pytest.param(bmp(10, 10, bits=2), "is a BMP of compression 0 with 2 bits", id="BMP of two bits"),
    ],
)
def test_a_header_that_is_no_good_is_refused_in_words(data: bytes, says: str) -> None:
    assert says in refusal(data)


def test_junk_and_fill_bytes_between_jpeg_segments_are_skipped() -> None:
    data = JPEG[:20] + b"abc\xff\0\xff\xff\xff" + JPEG[20:SOF] + bytes(100) + JPEG[SOF:]
    assert read_header(data).width == 256
    assert Image.open(io.BytesIO(data)).size == (256, 256)


@settings(max_examples=1000, deadline=None)
@given(
    st.sampled_from(
        [JPEG, PNG, WEBP, encode(RGB, "BMP"), encode(RGB, "WEBP", lossless=True), os2_bmp(9, 9), ftyp(b"x")]
    ),
    st.lists(st.tuples(st.integers(0, 700), st.binary(max_size=4), st.integers(0, 4)), max_size=5),
    st.integers(0, 800),
)
def test_damaged_bytes_raise_nothing_but_a_refusal(
    data: bytes, edits: list[tuple[int, bytes, int]], length: int
) -> None:
    damaged = bytearray(data)
    for at, insert, removed in edits:
        damaged[at : at + removed] = insert
    for attempt in (bytes(damaged), bytes(damaged[:length])):
        try:
            header = read_header(attempt)
        except InvalidRequestError:
            continue
        assert header.width > 0
        assert header.height > 0
        assert header.decode_bytes(248) > header.width * header.height / 64


HOSTILE = {
    "short segments": b"\xff\xd8" + SEGMENT * 4_000_000,
    "junk": b"\xff\xd8\xff\xe0\0\x02" + bytes(16_000_000),
    "fill bytes": b"\xff\xd8" + b"\xff" * 16_000_000,
    "fill bytes with zeros between": b"\xff\xd8" + (b"\xff" * 4000 + b"\0") * 4000,
    "far segments": b"\xff\xd8" + (b"\xff\xe5\xff\xff" + bytes(65533)) * 240,
    "webp chunks": WEBP[:4] + struct.pack("<I", 15_999_992) + WEBP[8:30] + bytes(15_999_970),
    "brands": ftyp(*[b"abcd"] * 4_000_000),
    "spaces": b" " * 16_000_000,
}


@pytest.mark.parametrize("data", HOSTILE.values(), ids=HOSTILE)
def test_the_work_does_not_grow_with_the_file(data: bytes) -> None:
    # Lines that Python runs are counted, which no busy machine changes. A line searches 4 KiB at most.
    lines = 0

    def count(*_: object) -> object:
        nonlocal lines
        lines += 1
        return count

    sys.settrace(count)
    try:
        refusal(data)
    finally:
        sys.settrace(None)
    assert lines < 20_000
