"""Resizing, cropping and normalising: what timm does, to the last bit, and without torch."""

import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

import tome_server.merging.timm_import  # noqa: F401  isort: skip
from timm.data import create_transform

from tome_server.models.loaded import normalise
from tome_server.models.transform import CROP_MODES, INTERPOLATIONS, ImageSettings, transform


def of_timm(image: Image.Image, settings: ImageSettings) -> "np.ndarray[tuple[int, ...], np.dtype[np.float32]]":
    return create_transform(
        input_size=settings.input_size, interpolation=settings.interpolation, mean=settings.mean, std=settings.std,
        crop_pct=settings.crop_pct, crop_mode=settings.crop_mode,
    )(image).numpy()  # fmt: skip


def normalised(image: Image.Image, settings: ImageSettings) -> "np.ndarray[tuple[int, ...], np.dtype[np.float32]]":
    """What a model sees: the way of an image through both processes."""
    pixels = transform(image, settings)
    assert pixels.dtype == np.uint8
    given = normalise(torch.from_numpy(pixels)[None], settings)[0].numpy()
    assert given.dtype == np.float32
    return given


def noise(width: int, height: int, channels: int) -> Image.Image:
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, channels), np.uint8)
    return Image.fromarray(pixels if channels == 3 else pixels[..., 0])


sides = st.integers(8, 90)
VALUES = {1: ((0.3,), (0.2,)), 3: ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))}


@given(
    size=st.tuples(sides, sides),
    wanted=st.tuples(sides, sides) | sides.map(lambda side: (side, side)),
    channels=st.sampled_from([1, 3]),
    interpolation=st.sampled_from(INTERPOLATIONS),
    crop_mode=st.sampled_from(CROP_MODES),
    crop_pct=st.sampled_from([0.5, 0.875, 0.9, 1.0, 1.3]),
)
def test_it_is_timms_to_the_last_bit(
    size: tuple[int, int], wanted: tuple[int, int], channels: int, interpolation: str, crop_mode: str, crop_pct: float
) -> None:
    mean, std = VALUES[channels]
    settings = ImageSettings((channels, *wanted), mean, std, interpolation, crop_pct, crop_mode)
    image = noise(*size, channels)
    assert np.array_equal(normalised(image, settings), of_timm(image, settings))


@pytest.mark.parametrize("size", [(500, 375), (375, 500), (224, 224), (1024, 768)])
@pytest.mark.parametrize("crop_mode", CROP_MODES)
def test_photos_of_the_usual_sizes_are_timms(crop_mode: str, size: tuple[int, int]) -> None:
    settings = ImageSettings((3, 224, 224), *VALUES[3], "bicubic", 0.9, crop_mode)
    image = noise(*size, 3)
    assert np.array_equal(normalised(image, settings), of_timm(image, settings))


def test_the_process_that_answers_requests_never_imports_torch() -> None:
    code = "import sys, tome_server.app; print({'torch', 'timm', 'torchvision'} & set(sys.modules))"
    imported = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert imported.stdout.strip() == "set()"
