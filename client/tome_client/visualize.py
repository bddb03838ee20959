"""Draws which patches of an image were merged: Figure 1 of the ToMe paper, for one answer.

Needs Pillow, which the plain install does not bring.
"""

from __future__ import annotations

import math
import os

from tome_client.inputs import rgb
from tome_client.results import ImageInput, TokenMap

try:
    from PIL import Image, ImageDraw, ImageOps
except ImportError as error:
    raise ImportError("drawing needs Pillow: pip install 'tome-serving[visualize]'") from error

Colour = tuple[int, int, int]

# A picture is enlarged to at least this many pixels a side; bundled:fashion sees 28.
_LEAST_SIDE = 448

_GAP = 8

_WHITE: Colour = (255, 255, 255)
_BLACK: Colour = (0, 0, 0)


def picture_of(source: str | os.PathLike[str], expects: ImageInput, token_map: TokenMap) -> Image.Image:
    """Returns the picture for an image file that was sent as it is.

    Raises:
        OSError: The file cannot be read as an image.
        ValueError: It has more than 8 bits a channel.
    """
    with Image.open(source) as image:
        return side_by_side(model_view(image, expects), token_map)


def side_by_side(image: Image.Image, token_map: TokenMap) -> Image.Image:
    """Returns a picture of the model's input on the left and its merged tokens on the right.

    Args:
        image: The source image, cropped as `model_view` does.
        token_map: Where its patches went.
    """
    scale = max(1, math.ceil(_LEAST_SIDE / max(image.size)))
    width, height = image.width * scale, image.height * scale
    picture = Image.new("RGB", (2 * width + _GAP, height), _WHITE)
    picture.paste(image.resize((width, height), Image.Resampling.NEAREST), (0, 0))
    picture.paste(merged_patches(image, token_map, scale), (width + _GAP, 0))
    return picture


def model_view(image: Image.Image, expects: ImageInput) -> Image.Image:
    """Returns the part of an image that the model sees, at the size it sees it: RGB."""
    image = rgb(ImageOps.exif_transpose(image))
    if expects.channels == 1:
        image = image.convert("L").convert("RGB")
    width, height = expects.width, expects.height
    wide, high = math.floor(width / expects.crop_pct), math.floor(height / expects.crop_pct)
    if expects.crop_mode != "squash":
        # "border" fits the image in and pads it; "center" fills the frame and cuts it.
        fit = min if expects.crop_mode == "border" else max
        ratio = fit(wide / image.width, high / image.height)
        wide, high = round(image.width * ratio), round(image.height * ratio)
    resampling = getattr(Image.Resampling, expects.interpolation.upper(), Image.Resampling.BICUBIC)
    resized = image.resize((wide, high), resampling)
    padding = tuple(round(255 * mean) for mean in expects.mean)
    view = Image.new("RGB", (width, height), padding * (3 // len(padding)) or _BLACK)
    view.paste(resized, (round((width - wide) / 2), round((height - high) / 2)))
    return view


def merged_patches(image: Image.Image, token_map: TokenMap, scale: int = 1) -> Image.Image:
    """Returns the image with each patch in the mean colour of the patches it was merged with.

    A line separates patches of different tokens, black or white, whichever is better seen.

    Args:
        image: RGB, [height, width], the model's view.
        token_map: One token a patch.
        scale: How many times larger than `image` the picture is.
    """
    columns, rows = token_map.grid_width, token_map.grid_height
    colours = _region_colours(image, token_map)
    flat = bytes(channel for token in token_map.token for channel in colours[token])
    size = width, height = image.width * scale, image.height * scale
    picture = Image.frombytes("RGB", (columns, rows), flat).resize(size, Image.Resampling.NEAREST)

    draw = ImageDraw.Draw(picture)
    line = max(1, round(min(width / columns, height / rows) / 16))
    for row in range(rows):
        for column in range(columns):
            here = token_map.token[row * columns + column]
            left, right = round(column * width / columns), round((column + 1) * width / columns)
            top, bottom = round(row * height / rows), round((row + 1) * height / rows)
            if column and (beside := token_map.token[row * columns + column - 1]) != here:
                edge = (left - line // 2, top, left - line // 2 + line - 1, bottom - 1)
                draw.rectangle(edge, fill=_contrast(colours[here], colours[beside]))
            if row and (above := token_map.token[(row - 1) * columns + column]) != here:
                edge = (left, top - line // 2, right - 1, top - line // 2 + line - 1)
                draw.rectangle(edge, fill=_contrast(colours[here], colours[above]))
    return picture


def _region_colours(image: Image.Image, token_map: TokenMap) -> dict[int, Colour]:
    """Returns each token's mean colour."""
    # A box filter down to one pixel a patch is the mean over the patch.
    patches = image.resize((token_map.grid_width, token_map.grid_height), Image.Resampling.BOX).tobytes()
    members: dict[int, list[int]] = {}
    for patch, token in enumerate(token_map.token):
        members.setdefault(token, []).append(patch)

    def mean(region: list[int], channel: int) -> int:
        return round(sum(patches[3 * patch + channel] for patch in region) / len(region))

    return {token: (mean(region, 0), mean(region, 1), mean(region, 2)) for token, region in members.items()}


def _contrast(one: Colour, other: Colour) -> Colour:
    red, green, blue = (a + b for a, b in zip(one, other, strict=True))
    return _BLACK if 0.299 * red + 0.587 * green + 0.114 * blue > 255 else _WHITE
