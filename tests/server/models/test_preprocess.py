import io
import math
import pickle
import struct
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image

import tome_server.models.preprocess as preprocess_module
from tome_server.errors import InvalidRequestError
from tome_server.models.preprocess import Limits, Preprocess
from tome_server.models.transform import ImageSettings, Picture, transform

PLAIN = ImageSettings((3, 32, 32), (0.0, 0.0, 0.0), (1.0, 1.0, 1.0), "bicubic", 1.0, "center")
PREPROCESS = Preprocess(PLAIN, Limits())
ORANGE = (200, 100, 50)
WHITE = (255, 255, 255)


def encode(image: Image.Image, kind: str, **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def solid(mode: str, colour: object, size: tuple[int, int] = (40, 40)) -> Image.Image:
    image = Image.new(mode, size, colour)
    if mode in ("P", "PA"):
        image.putpalette([0, 0, 0, *ORANGE])
    return image


def gradients(width: int, height: int) -> Image.Image:
    """An image that is different everywhere, yet smooth, so that JPEG keeps it."""
    across, down = np.linspace(0, 255, width), np.linspace(0, 255, height)[:, None]
    pixels = np.stack([across + 0 * down, 0 * across + down, (across + down) / 2], axis=-1)
    return Image.fromarray(pixels.astype(np.uint8))


def mean_colour(image: NDArray[np.uint8]) -> tuple[int, ...]:
    return tuple(round(float(value)) for value in image.mean(axis=(1, 2)))


def png(width: int, height: int, depth: int, colour: int, rows: bytes) -> bytes:
    """A PNG file of Pillow's making or not: Pillow writes no 16-bit colour."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def bmp(width: int, height: int) -> bytes:
    """A BMP file that ends after its headers."""
    header = struct.pack("<IiiHHIIiiII", 40, width, height, 1, 24, 0, 0, 0, 0, 0, 0)
    return b"BM" + struct.pack("<IHHI", 54, 0, 0, 54) + header


def webp(width: int, height: int) -> bytes:
    """A lossless WebP of one colour, whose pixels take no bits at all: a few bytes, however large."""
    data = bytearray(encode(solid("RGB", "red", (16, 16)), "WEBP", lossless=True))
    start = data.index(b"\x2f", data.index(b"VP8L")) + 1
    bits = int.from_bytes(data[start : start + 4], "little")
    sizes = (width - 1) | (height - 1) << 14
    data[start : start + 4] = (bits & ~(2**28 - 1) | sizes).to_bytes(4, "little")
    return bytes(data)


def refusal(call: Callable[[], object]) -> InvalidRequestError:
    with pytest.raises(InvalidRequestError) as caught:
        call()
    return caught.value


VIT = replace(PLAIN, input_size=(3, 224, 224), mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.5), crop_pct=0.9)


@pytest.mark.parametrize("size", [(500, 375), (224, 224), (40, 90)])
def test_every_way_in_prepares_alike(size: tuple[int, int]) -> None:
    image = gradients(*size)
    preprocess = Preprocess(VIT, Limits())
    expected = transform(image, VIT)
    width, height = size
    assert np.array_equal(preprocess.encoded(encode(image, "PNG")), expected)
    assert np.array_equal(preprocess.image(image), expected)
    assert np.array_equal(preprocess.pixels((height, width, 3), image.tobytes()), expected)


@pytest.mark.parametrize(
    ("data", "colour"),
    [
        pytest.param(encode(solid("1", 1), "PNG"), WHITE, id="1"),
        pytest.param(encode(solid("L", 200), "PNG"), (200, 200, 200), id="L"),
        pytest.param(encode(solid("L", 200), "PNG", transparency=200), WHITE, id="L+tRNS"),
        pytest.param(encode(solid("LA", (200, 255)), "PNG"), (200, 200, 200), id="LA opaque"),
        pytest.param(encode(solid("LA", (0, 51)), "PNG"), (204, 204, 204), id="LA translucent"),
        pytest.param(encode(solid("P", 1), "PNG"), ORANGE, id="P"),
        pytest.param(encode(solid("P", 1), "PNG", transparency=1), WHITE, id="P+tRNS"),
        pytest.param(encode(solid("P", 1), "PNG", transparency=0), ORANGE, id="P+tRNS of another colour"),
        pytest.param(encode(solid("P", 1), "PNG", transparency=b"\xff\x00"), WHITE, id="P+tRNS, one alpha a colour"),
        pytest.param(encode(solid("P", 1), "BMP"), ORANGE, id="P BMP"),
        pytest.param(encode(solid("RGB", ORANGE), "PNG"), ORANGE, id="RGB"),
        pytest.param(encode(solid("RGB", ORANGE), "PNG", transparency=ORANGE), WHITE, id="RGB+tRNS"),
        pytest.param(encode(solid("RGB", ORANGE), "BMP"), ORANGE, id="RGB BMP"),
        pytest.param(encode(solid("RGBA", (*ORANGE, 255)), "PNG"), ORANGE, id="RGBA opaque"),
        pytest.param(encode(solid("RGBA", (*ORANGE, 0)), "PNG"), WHITE, id="RGBA transparent"),
        pytest.param(encode(solid("RGBA", (0, 0, 0, 51)), "PNG"), (204, 204, 204), id="RGBA translucent"),
        pytest.param(encode(solid("RGBA", (*ORANGE, 0)), "WEBP", lossless=True), WHITE, id="RGBA WebP"),
        pytest.param(encode(solid("I;16", 200 * 257), "PNG"), (200, 200, 200), id="16-bit grey"),
        pytest.param(
            png(8, 8, 16, 2, (b"\0" + struct.pack(">HHH", *(257 * value for value in ORANGE)) * 8) * 8),
            ORANGE,
            id="16-bit RGB",
        ),
    ],
)
def test_every_kind_of_image_keeps_its_colours_and_lies_on_white(data: bytes, colour: tuple[int, ...]) -> None:
    assert mean_colour(PREPROCESS.encoded(data)) == colour


@pytest.mark.parametrize("mode", ["RGB", "CMYK", "YCbCr"])
def test_every_kind_of_jpeg_keeps_its_colours(mode: str) -> None:
    data = encode(solid("RGB", ORANGE).convert(mode), "JPEG", quality=100)
    assert mean_colour(PREPROCESS.encoded(data)) == pytest.approx(ORANGE, abs=2)


@pytest.mark.parametrize(
    ("image", "colour"),
    [
        pytest.param(solid("PA", (1, 255)), ORANGE, id="PA opaque"),
        pytest.param(solid("PA", (1, 0)), WHITE, id="PA transparent"),
        pytest.param(solid("I", 65535), WHITE, id="I"),
        # L* of 50 is middle grey; LAB has an A in its name and no transparency.
        pytest.param(solid("LAB", (128, 128, 128)), (119, 119, 119), id="LAB"),
    ],
)
def test_decoded_images_of_rarer_modes_keep_their_colours(image: Image.Image, colour: tuple[int, ...]) -> None:
    assert mean_colour(PREPROCESS.image(image)) == pytest.approx(colour, abs=1)


UPRIGHT_FROM_STORED = {
    1: None,
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_90,  # undoes the quarter turn to the right that orientation 6 asks for
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_270,
}


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
@pytest.mark.parametrize("orientation", UPRIGHT_FROM_STORED)
def test_an_image_is_turned_upright_as_its_exif_says(orientation: int, kind: str) -> None:
    upright = Image.new("RGB", (64, 64), "red")
    for colour, corner in (("lime", (32, 0)), ("blue", (0, 32)), ("white", (32, 32))):
        upright.paste(colour, (*corner, corner[0] + 32, corner[1] + 32))
    operation = UPRIGHT_FROM_STORED[orientation]
    stored = upright if operation is None else upright.transpose(operation)
    exif = Image.Exif()
    exif[0x0112] = orientation
    got = PREPROCESS.encoded(encode(stored, kind, exif=exif, quality=100))
    corners = [got[:, y, x] for y in (8, 24) for x in (8, 24)]
    expected = [[255, 0, 0], [0, 255, 0], [0, 0, 255], [255, 255, 255]]
    assert np.allclose(corners, expected, atol=8)


@pytest.fixture
def decoded_sizes(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """Sizes of the images as they leave the decoder."""
    sizes: list[tuple[int, int]] = []

    def record(picture: Picture, settings: ImageSettings) -> NDArray[np.uint8]:
        sizes.append(picture.size)
        return transform(picture, settings)

    monkeypatch.setattr(preprocess_module, "transform", record)
    return sizes


@pytest.mark.parametrize("size", [(1600, 1200), (1200, 1600), (900, 901), (497, 496), (495, 2000), (100, 80)])
@pytest.mark.parametrize("chosen", [VIT, replace(VIT, input_size=(3, 256, 64)), replace(VIT, input_size=(3, 64, 256))])
def test_a_jpeg_is_decoded_no_smaller_than_the_model_needs_and_looks_the_same(
    chosen: ImageSettings, size: tuple[int, int], decoded_sizes: list[tuple[int, int]]
) -> None:
    preprocess = Preprocess(replace(chosen, mean=PLAIN.mean, std=PLAIN.std), Limits())
    exif = Image.Exif()
    exif[0x0112] = 6
    data = encode(gradients(*size), "JPEG", quality=95, exif=exif)
    quick = preprocess.encoded(data)
    full = preprocess.image(Image.open(io.BytesIO(data)))
    assert float(np.abs(quick.astype(int) - full).mean()) < 1
    (width, height), original = decoded_sizes
    needed_height, needed_width = (math.floor(length / chosen.crop_pct) for length in chosen.input_size[1:])
    assert (width >= needed_width and height >= needed_height) or (width, height) == original


def test_a_large_jpeg_is_decoded_at_a_fraction_of_its_size(decoded_sizes: list[tuple[int, int]]) -> None:
    Preprocess(VIT, Limits()).encoded(encode(gradients(2400, 1800), "JPEG"))
    assert decoded_sizes == [(600, 450)]


def test_a_photo_with_a_preview_is_a_photo() -> None:
    photo, preview = solid("RGB", ORANGE), solid("RGB", "blue")
    data = encode(photo, "MPO", save_all=True, append_images=[preview])
    assert Image.open(io.BytesIO(data)).format == "MPO"
    assert mean_colour(PREPROCESS.encoded(data)) == pytest.approx(ORANGE, abs=4)


FRAMES = [solid("RGB", "red"), solid("RGB", "blue")]
PHOTO = encode(gradients(64, 48), "JPEG")


@pytest.mark.parametrize(
    ("data", "says"),
    [
        pytest.param(b"", "is empty", id="nothing"),
        pytest.param(b"no image at all" * 99, "is not a JPEG, PNG, WEBP or BMP image", id="text"),
        pytest.param(b"\0" * 5000, "is not a JPEG, PNG, WEBP or BMP image", id="zeros"),
        pytest.param(encode(FRAMES[0], "GIF"), "is a GIF image; accepted are", id="GIF"),
        pytest.param(encode(FRAMES[0], "TIFF"), "is a TIFF image; accepted are", id="TIFF"),
        pytest.param(encode(FRAMES[0], "WEBP", save_all=True, append_images=FRAMES[1:]), "animated", id="WebP"),
        pytest.param(encode(FRAMES[0], "PNG", save_all=True, append_images=FRAMES[1:]), "animated", id="APNG"),
        pytest.param(PHOTO[:-100], "is cut off: it ends before its last pixel", id="JPEG cut in its pixels"),
        pytest.param(PHOTO[:20], "is cut off", id="20 bytes of a JPEG"),
        pytest.param(encode(gradients(64, 48), "PNG")[:-60], "is cut off", id="PNG cut in its pixels"),
        pytest.param(png(40_000, 40_000, 8, 2, b""), "is 40000×40000 pixels; at most 50,000,000", id="PNG header"),
        pytest.param(png(2**31 - 1, 2**31 - 1, 8, 2, b""), "at most 50,000,000", id="largest PNG header"),
        pytest.param(png(0, 0, 8, 2, b""), "is 0×0 pixels", id="PNG of no size"),
        pytest.param(bmp(2**31 - 1, 2**31 - 1), "is cut off", id="largest BMP header"),
        pytest.param(bmp(7000, -7000), "is cut off", id="BMP header alone"),
        pytest.param(bmp(0, 10), "is 0×10 pixels", id="BMP of no width"),
        pytest.param(webp(16383, 16383), "is 16383×16383 pixels; at most 50,000,000", id="WebP of one colour"),
        pytest.param(encode(Image.new("1", (60_000, 1)), "PNG"), "too long and thin", id="line"),
        pytest.param(encode(Image.new("1", (1, 60_000)), "PNG"), "too long and thin", id="upright line"),
    ],
)
def test_what_is_no_acceptable_image_is_refused_in_words(data: bytes, says: str) -> None:
    error = refusal(lambda: PREPROCESS.encoded(data))
    assert error.field == "image"
    assert says in error.description


@pytest.mark.parametrize(
    "data", [webp(16383, 16383), png(2**31 - 1, 2**31 - 1, 8, 2, b""), bmp(30_000, 30_000)], ids=["webp", "png", "bmp"]
)
def test_a_refused_image_takes_no_memory_for_its_pixels(data: bytes) -> None:
    def peak() -> int:
        status = Path("/proc/self/status").read_text()
        return int(status.split("VmHWM:")[1].split()[0]) * 1024

    try:
        Path("/proc/self/clear_refs").write_text("5")  # sets the peak to what is in use now
    except OSError as error:
        pytest.skip(f"the peak of memory can't be reset here: {error}")
    before = peak()
    refusal(lambda: PREPROCESS.encoded(data))
    assert peak() - before < 64 * 2**20


def test_bytes_are_accepted_to_the_limit_and_no_further() -> None:
    data = encode(solid("RGB", ORANGE), "PNG")
    assert Preprocess(PLAIN, Limits(max_bytes=len(data))).encoded(data).shape == (3, 32, 32)
    error = refusal(lambda: Preprocess(PLAIN, Limits(max_bytes=len(data) - 1)).encoded(data))
    assert error.field == "image"
    assert "bytes; at most" in error.description
    pixels = bytes(40 * 40 * 3)
    assert Preprocess(PLAIN, Limits(max_bytes=len(pixels))).pixels((40, 40, 3), pixels).shape == (3, 32, 32)
    limited = Preprocess(PLAIN, Limits(max_bytes=len(pixels) - 1))
    assert refusal(lambda: limited.pixels((40, 40, 3), pixels)).field == "tensor.data"


def test_pixels_are_accepted_to_the_limit_and_no_further() -> None:
    preprocess = Preprocess(PLAIN, Limits(max_pixels=2500))
    assert preprocess.encoded(encode(solid("L", 9, (50, 50)), "PNG")).shape == (3, 32, 32)
    assert refusal(lambda: preprocess.encoded(encode(solid("L", 9, (50, 51)), "PNG"))).field == "image"
    assert preprocess.pixels((50, 50, 3), bytes(50 * 50 * 3)).shape == (3, 32, 32)
    assert refusal(lambda: preprocess.pixels((51, 50, 3), bytes(51 * 50 * 3))).field == "tensor.shape"


def test_pixels_count_after_resizing_too() -> None:
    # 16 pixels across grow to 32, and 160 along to 320.
    preprocess = Preprocess(PLAIN, Limits(max_pixels=32 * 320))
    assert preprocess.encoded(encode(solid("L", 9, (16, 160)), "PNG")).shape == (3, 32, 32)
    assert "long and thin" in refusal(lambda: preprocess.encoded(encode(solid("L", 9, (16, 161)), "PNG"))).description
    assert refusal(lambda: preprocess.pixels((161, 16, 3), bytes(161 * 16 * 3))).field == "tensor.shape"


@pytest.mark.parametrize(
    "shape", [(), (40,), (40, 40), (40, 40, 1), (40, 40, 4), (3, 40, 40), (0, 40, 3), (1, 2, 3, 3), (-1, -1, 3)]
)
def test_pixels_of_another_shape_are_refused(shape: tuple[int, ...]) -> None:
    assert refusal(lambda: PREPROCESS.pixels(shape, bytes(40 * 40 * 3))).field == "tensor.shape"


@pytest.mark.parametrize("length", [0, 40 * 40 * 3 - 1, 40 * 40 * 3 + 1])
def test_pixels_of_another_length_than_their_shape_are_refused(length: int) -> None:
    error = refusal(lambda: PREPROCESS.pixels((40, 40, 3), bytes(length)))
    assert error.field == "tensor.data"
    assert "takes 4,800" in error.description


def test_a_ready_tensor_reaches_the_model_untouched() -> None:
    values = np.random.default_rng(0).normal(0, 3, (3, 32, 32)).astype("<f4")
    got = PREPROCESS.normalised((3, 32, 32), values.tobytes())
    assert got.dtype == np.float32
    assert np.array_equal(got, values)


@pytest.mark.parametrize("shape", [(), (3, 32), (1, 3, 32, 32), (32, 32, 3), (3, 32, 33)])
def test_a_ready_tensor_of_another_shape_is_refused(shape: tuple[int, ...]) -> None:
    error = refusal(lambda: PREPROCESS.normalised(shape, bytes(3 * 32 * 32 * 4)))
    assert error.field == "tensor.shape"
    assert "[3, 32, 32]" in error.description


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_ready_tensor_must_be_finite_and_whole(bad: float) -> None:
    values = np.zeros((3, 32, 32), "<f4")
    assert refusal(lambda: PREPROCESS.normalised((3, 32, 32), values.tobytes()[:-4])).field == "tensor.data"
    values[1, 2, 3] = bad
    error = refusal(lambda: PREPROCESS.normalised((3, 32, 32), values.tobytes()))
    assert error.field == "tensor.data"
    assert "NaN or infinity" in error.description


def test_a_grey_model_gets_one_channel_of_every_input() -> None:
    preprocess = Preprocess(replace(PLAIN, input_size=(1, 32, 32), mean=(0.5,), std=(0.5,)), Limits())
    inputs = (
        preprocess.encoded(encode(solid("L", 255), "PNG")),
        preprocess.encoded(encode(solid("RGBA", (0, 0, 0, 0)), "PNG")),
        preprocess.pixels((40, 40, 3), b"\xff" * 40 * 40 * 3),
    )
    for prepared in inputs:
        assert np.array_equal(prepared, np.full((1, 32, 32), 255))


def test_a_model_of_other_channels_takes_ready_tensors_alone() -> None:
    preprocess = Preprocess(replace(PLAIN, input_size=(4, 32, 32), mean=(0.5,) * 4, std=(0.5,) * 4), Limits())
    assert "4 channels" in refusal(lambda: preprocess.encoded(encode(solid("RGB", ORANGE), "PNG"))).description
    assert preprocess.normalised((4, 32, 32), bytes(4 * 32 * 32 * 4)).shape == (4, 32, 32)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"mean": (0.5,)}, "mean and std take 3 numbers"),
        ({"std": (0.5, 0.0, 0.5)}, "no std may be 0"),
        ({"crop_mode": "centre"}, "'centre' is none of center, squash, border"),
        ({"interpolation": "cubic"}, "'cubic' is none of nearest"),
        ({"crop_pct": -1.0}, "crop_pct must be positive"),
        ({"input_size": (3, 0, 32)}, "input_size must be channels, height and width"),
    ],
)
def test_settings_that_would_fail_or_be_ignored_later_are_refused(change: dict[str, object], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        replace(PLAIN, **change)


def test_threads_may_share_one() -> None:
    images = [encode(gradients(300 + 7 * i, 200), kind) for i in range(4) for kind in ("JPEG", "PNG", "WEBP")]
    alone = [PREPROCESS.encoded(image) for image in images]
    with ThreadPoolExecutor(8) as threads:
        together = list(threads.map(PREPROCESS.encoded, images * 8))
    assert all(np.array_equal(got, alone[i % len(alone)]) for i, got in enumerate(together))


def test_a_copy_in_another_process_prepares_alike() -> None:
    image = encode(gradients(300, 200), "JPEG")
    copy = pickle.loads(pickle.dumps(Preprocess(VIT, Limits(max_pixels=100_000))))
    assert np.array_equal(copy.encoded(image), Preprocess(VIT, Limits()).encoded(image))
    assert "at most 100,000 pixels" in refusal(lambda: copy.encoded(encode(gradients(400, 251), "PNG"))).description


def real_images() -> list[bytes]:
    exif = Image.Exif()
    exif[0x0112] = 6
    image = gradients(24, 20)
    return [
        encode(image, "JPEG", exif=exif),
        encode(image, "JPEG", progressive=True),
        encode(image.convert("CMYK"), "JPEG"),
        encode(image, "MPO", save_all=True, append_images=[image]),
        encode(image, "PNG", exif=exif),
        encode(image.quantize(), "PNG", transparency=b"\x01\x80"),
        encode(image.convert("L"), "PNG", transparency=3),
        encode(image, "WEBP", exif=exif),
        encode(image.convert("RGBA"), "WEBP", lossless=True),
        encode(image, "BMP"),
        encode(image.quantize(), "BMP"),
        encode(image, "GIF"),
    ]


MAGIC = [
    b"",
    b"\xff\xd8\xff",
    b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR",
    b"RIFF\x30\0\0\0WEBPVP8 ",
    b"RIFF\0\0\0\0WEBPVP8X",
    b"BM",
    b"GIF89a",
]


def mended(data: bytes) -> bytes:
    """The PNG with the right check sums, so that what is in its chunks is looked at; anything else as it is."""
    whole, at = bytearray(data), 8
    while data.startswith(b"\x89PNG") and at + 12 <= len(data):
        end = at + 12 + int.from_bytes(data[at : at + 4])
        whole[end - 4 : end] = struct.pack(">I", zlib.crc32(data[at + 4 : end - 4])) if end <= len(data) else b""
        at = end
    return bytes(whole)


def survive(data: bytes) -> None:
    """Prepare `data` or refuse it; whatever else is raised fails the test."""
    try:
        prepared = PREPROCESS.encoded(data)
    except InvalidRequestError:
        return
    assert prepared.shape == (3, 32, 32)
    assert prepared.dtype == np.uint8


@settings(max_examples=300, deadline=None)
@given(st.sampled_from(MAGIC), st.binary(max_size=300))
def test_arbitrary_bytes_raise_nothing_but_a_refusal(magic: bytes, data: bytes) -> None:
    survive(magic + data)


@settings(max_examples=500, deadline=None)
@given(
    st.sampled_from(real_images()),
    st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.binary(max_size=4), st.integers(0, 4)), max_size=6),
    st.booleans(),
)
def test_damaged_images_raise_nothing_but_a_refusal(
    image: bytes, edits: list[tuple[float, bytes, int]], in_header: bool
) -> None:
    damaged = bytearray(image)
    for where, insert, removed in edits:
        at = int(where * min(len(damaged), 64 if in_header else len(damaged)))
        damaged[at : at + removed] = insert
    survive(bytes(damaged))
    survive(mended(bytes(damaged)))
