"""Decoded images, for models that take pixels.

Needs Pillow, which the plain install does not bring.
"""

from __future__ import annotations

import io
from collections.abc import Sequence

from tome_client.load.images import Sample

try:
    from PIL import Image
except ImportError as error:
    raise ImportError(
        "a model that takes pixels needs images to be decoded, with Pillow: pip install 'tome-serving[visualize]'"
    ) from error

_MODES = {1: "L", 3: "RGB", 4: "RGBA"}


def planes(
    sample: Sample,
    channels: int,
    size: tuple[int, int] | None,
    *,
    normalised: bool,
    mean: Sequence[float],
    std: Sequence[float],
) -> tuple[tuple[int, int], list[bytes]]:
    """Decodes an image.

    Args:
        sample: The image.
        channels: 1 for grey, 3 for RGB, 4 for RGBA.
        size: Width and height that it is resized to; None to keep its own.
        normalised: Whether pixels become floats, scaled to [0, 1], less `mean`, divided by `std`, and not bytes.
        mean: One value for all channels, or one for each; likewise `std`.

    Returns:
        Width and height, and the elements of each channel, row by row.

    Raises:
        ValueError: The image cannot be decoded, or `mean` or `std` have another number of values.
    """
    if not {len(mean), len(std)} <= {1, channels}:
        raise ValueError(f"--mean and --std need one value, or one for each of the {channels} channels")
    try:
        with Image.open(io.BytesIO(sample.data)) as opened:
            image = opened.convert(_MODES[channels])
    except (OSError, Image.DecompressionBombError) as error:
        raise ValueError(f"{sample.name} can't be decoded: {error}") from None
    if size and size != image.size:
        image = image.resize(size, Image.Resampling.BICUBIC)
    bands = image.split()
    if not normalised:
        return image.size, [band.tobytes() for band in bands]
    means, stds = ([*values] * (channels if len(values) == 1 else 1) for values in (mean, std))
    return image.size, [
        # Of floats, Pillow takes only a factor and a term.
        band.convert("F").point(lambda value, m=m, s=s: value * (1 / (255 * s)) + -m / s).tobytes()
        for band, m, s in zip(bands, means, stds, strict=True)
    ]
