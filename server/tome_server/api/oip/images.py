"""Splits the input tensor into images that are scheduled one by one."""

import math

from tome_server.api.oip.messages import BYTES, DTYPES, MOST_DIMENSIONS, Tensor, check_count, check_datatype, shown
from tome_server.errors import InvalidRequestError, TooLargeError
from tome_server.serving.requests import EncodedImage, Normalised, Pixels

INPUT = "image"


def images_of(tensor: Tensor, most: int) -> list[EncodedImage | Pixels | Normalised]:
    """Return the images of a request's input.

    FP32 [N, C, H, W] is the model's own input, UINT8 [N, H, W, 3] are RGB pixels, BYTES [N] or [N, 1] encoded images.
    Raises InvalidRequestError if the tensor is none of these or contradicts itself, TooLargeError if there are more
    than `most`. The images themselves are checked when they are prepared.
    """
    if tensor.name != INPUT:
        raise InvalidRequestError("inputs", f"the only input is called {INPUT}, not {shown(tensor.name)}")
    check_datatype(tensor.datatype)
    count, data = _count(tensor), tensor.data
    if not isinstance(data, bytes):
        if len(data) != count:
            raise InvalidRequestError(INPUT, f"has {len(data):,} elements; its shape says {count:,}")
        _check_number(count, most)
        return [EncodedImage(element) for element in data]
    wanted = math.prod(tensor.shape) * DTYPES[tensor.datatype].itemsize
    if len(data) != wanted:
        text = f"has {len(data):,} bytes; {list(tensor.shape)} of {tensor.datatype} takes {wanted:,}"
        raise InvalidRequestError(INPUT, text)
    _check_number(count, most)
    shape, size = tensor.shape[1:], len(data) // count
    # Slicing bytes copies them, which a single image doesn't need.
    parts = [data] if count == 1 else [data[i * size : (i + 1) * size] for i in range(count)]
    kind = Normalised if tensor.datatype == "FP32" else Pixels
    return [kind(shape, part) for part in parts]


def _count(tensor: Tensor) -> int:
    """Return the number of images in the shape. Raises InvalidRequestError if the datatype can't have this shape."""
    shape = tensor.shape
    check_count("image.shape", len(shape), MOST_DIMENSIONS)
    form, fits = {
        "FP32": ("[N, channels, height, width]", len(shape) == 4),
        "UINT8": ("[N, height, width, 3]", len(shape) == 4 and shape[3] == 3),
        BYTES: ("[N] or [N, 1]", len(shape) == 1 or (len(shape) == 2 and shape[1] == 1)),
    }[tensor.datatype]
    if not fits or min(shape) < 1:
        text = f"must be {form} for {tensor.datatype}, each at least 1, not {list(shape)}"
        raise InvalidRequestError("image.shape", text)
    return shape[0]


def _check_number(count: int, most: int) -> None:
    if count > most:
        raise TooLargeError(f"{count:,} images in one request; this server holds at most {most:,} at once")
