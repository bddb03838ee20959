"""How a model's images are prepared: timm's data config, and what a spec overrides of it."""

import math
from collections.abc import Callable
from dataclasses import fields
from typing import Any

import tome_server.merging.timm_import  # noqa: F401  isort: skip

from timm.data import resolve_data_config
from timm.models.vision_transformer import VisionTransformer

from tome_server.errors import ModelLoadError
from tome_server.merging.geometry import default_size
from tome_server.models.spec import ModelSpec
from tome_server.models.transform import CROP_MODES, INTERPOLATIONS, ImageSettings

# More pixels to a side than any model takes.
LONGEST_SIDE = 8192
# Wider than what timm's models have (0.875 to 1.15), but still a share of an image.
CROP_PCT = (0.1, 2.0)


def check_data(spec: ModelSpec) -> None:
    """Raises ModelLoadError, naming the setting, for overrides of timm's data config that make no sense for any model.

    timm itself treats 0 as a setting that was left out, and takes most other numbers as they are.
    """
    valid = [setting.name for setting in fields(ImageSettings)]
    if unknown := sorted(spec.data.keys() - set(valid)):
        raise ModelLoadError(f"data of {spec.name}: {', '.join(unknown)} is none of {', '.join(valid)}")
    least, most = CROP_PCT
    accepted: dict[str, tuple[Callable[[Any], bool], str]] = {
        "input_size": (
            lambda size: _numbers(size, 3, 3) and all(type(n) is int and 1 <= n <= LONGEST_SIDE for n in size),
            f"input_size is [channels, height, width], whole numbers of 1 to {LONGEST_SIDE}",
        ),
        "mean": (
            lambda mean: _numbers(mean) and all(0 <= n <= 1 for n in mean),
            "mean and std are lists of one number a channel, of pixels from 0 to 1; a mean lies in 0..1",
        ),
        "std": (
            lambda std: _numbers(std) and all(0 < n <= 1 for n in std),
            "mean and std are lists of one number a channel, of pixels from 0 to 1; no std may be 0, or above 1",
        ),
        "crop_pct": (
            lambda share: _numbers([share]) and least <= share <= most,
            f"crop_pct is the share of the image that is kept, a number of {least:g} to {most:g}",
        ),
        "interpolation": (lambda name: name in INTERPOLATIONS, f"is none of {', '.join(INTERPOLATIONS)}"),
        "crop_mode": (lambda mode: mode in CROP_MODES, f"is none of {', '.join(CROP_MODES)}"),
    }
    for name, value in spec.data.items():
        fits, what = accepted[name]
        if not fits(value):
            said = f"{name}: {value!r} {what}" if what.startswith("is ") else f"{name}: {value!r} won't do: {what}"
            raise ModelLoadError(f"data of {spec.name}: {said}")


def _numbers(value: Any, least: int = 1, most: int = 1000) -> bool:
    """Return whether `value` is a list of finite numbers, and none of them true or false."""
    return (
        isinstance(value, list | tuple)
        and least <= len(value) <= most
        and all(isinstance(n, int | float) and not isinstance(n, bool) and abs(n) < math.inf for n in value)
    )


def image_settings(spec: ModelSpec, model: VisionTransformer) -> ImageSettings:
    """Return how a model's images are prepared. Raises ModelLoadError if the spec's overrides make no sense."""
    # timm's data config knows the size that the pretrained weights had, which kwargs may have changed.
    size = (model.in_chans, *default_size(model))
    try:
        return ImageSettings.from_timm(resolve_data_config({"input_size": size, **spec.data}, model=model))
    except AssertionError as error:
        sizes = "input_size is [channels, height, width]; mean and std are lists of one number a channel"
        raise ModelLoadError(f"data of {spec.name}: {sizes}") from error
    except (TypeError, ValueError, OverflowError) as error:
        raise ModelLoadError(f"data of {spec.name}: {error}") from error
