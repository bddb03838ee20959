import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageOps

from tome_server.models.images import upright
from tome_server.models.images.upright import Upright

MODES = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr", "I;16", "LAB", "HSV")


def noise(mode: str, width: int, height: int) -> Image.Image:
    values = np.random.default_rng(0).integers(0, 256, (height, width, 4), np.uint8)
    if mode == "I;16":
        return Image.fromarray(values[..., 0].astype(np.uint16) * 257)
    if mode in ("P", "PA"):
        return Image.fromarray(values, "RGBA").convert("RGB").quantize(200).convert(mode)
    if mode in ("CMYK", "RGBA"):
        return Image.frombytes(mode, (width, height), values.tobytes())
    if mode in ("LAB", "HSV", "YCbCr"):
        return Image.frombytes(mode, (width, height), values[..., :3].tobytes())
    return Image.fromarray(values, "RGBA").convert(mode)


def obvious(image: Image.Image, orientation: int) -> Image.Image:
    """The image laid on white and turned, all of it at once."""
    exif = image.getexif()
    exif[0x0112] = orientation
    if image.mode == "I;16":
        flat = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert("RGB")
    elif image.has_transparency_data:
        rgba = np.asarray(image.convert("RGBA")).astype(float)
        alpha = rgba[..., 3:] / 255
        flat = Image.fromarray(np.rint(rgba[..., :3] * alpha + 255 * (1 - alpha)).astype(np.uint8))
    else:
        flat = image.convert("RGB")
    flat.info["exif"] = exif.tobytes()
    return ImageOps.exif_transpose(flat)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("whole", [0, 10**6], ids=["by channels", "whole"])
def test_an_image_is_what_turning_and_compositing_all_of_it_gives(
    mode: str, orientation: int, whole: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(upright, "_STRIP_PIXELS", 500)
    monkeypatch.setattr(upright, "WHOLE_PIXELS", whole)
    image = noise(mode, 70, 41)
    expected = obvious(image, orientation)
    for channels, size in itertools.product(("RGB", "L"), (expected.size, (33, 57))):
        got = Upright(image, None, channels, orientation).resize(size, Image.Resampling.BICUBIC)
        assert got.mode == channels
        wanted = expected.convert(channels).resize(size, Image.Resampling.BICUBIC)
        worst = np.abs(np.asarray(got).astype(int) - np.asarray(wanted)).max()
        # Pillow rounds what it composites a little differently.
        assert worst <= (2 if image.has_transparency_data else 0)


@given(
    st.sampled_from(["RGB", "RGBA", "P", "L"]),
    st.tuples(st.integers(1, 300), st.integers(1, 300)),
    st.tuples(st.integers(1, 90), st.integers(1, 90)),
    st.sampled_from(list(Image.Resampling)[:6]),
    st.integers(1, 8),
)
def test_resizing_by_channels_gives_the_same_bits(
    mode: str, size: tuple[int, int], wanted: tuple[int, int], resample: Image.Resampling, orientation: int
) -> None:
    picture = Upright(noise(mode, *size), None, "RGB", orientation)
    whole = picture.resize(wanted, resample)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(upright, "WHOLE_PIXELS", 0)
        assert picture.resize(wanted, resample).tobytes() == whole.tobytes()


def test_a_mask_says_what_else_is_transparent() -> None:
    mask = Image.new("1", (4, 2))
    mask.putpixel((3, 0), 1)
    got = Upright(Image.new("RGB", (4, 2)), mask, "RGB", 6).resize((2, 4), Image.Resampling.NEAREST)
    # A quarter turn to the right brings the upper right corner to the lower right.
    assert [xy for xy in itertools.product(range(2), range(4)) if got.getpixel(xy) == (255, 255, 255)] == [(1, 3)]
