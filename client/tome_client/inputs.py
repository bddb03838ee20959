"""Turns an image, in any form that a caller may have it, into what the wire carries.

Nothing here imports numpy or Pillow: their images are recognised by their attributes.
"""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Protocol, Self, TypeAlias, TypeGuard, TypeVar, runtime_checkable

from tome_api.v1.inference_pb2 import Tensor

if TYPE_CHECKING:
    from typing_extensions import Buffer


@runtime_checkable
class PillowImage(Protocol):
    """The part of PIL.Image.Image that is used."""

    @property
    def mode(self) -> str:
        """Such as "RGB"."""

    @property
    def size(self) -> tuple[int, int]:
        """Width and height."""

    @property
    def info(self) -> dict[Any, Any]:
        """Facts from the file, such as a transparent colour."""

    def convert(self, mode: str, /) -> Self:
        """Returns the image in another mode."""

    def copy(self) -> Self:
        """Returns another image of the same pixels."""

    def paste(self, colour: str, box: tuple[int, int, int, int], /) -> None:
        """Fills a rectangle."""

    def alpha_composite(self, layer: Self, /) -> None:
        """Composites an image over this one."""

    def tobytes(self) -> bytes:
        """Returns the pixels, row by row."""


_Pillow = TypeVar("_Pillow", bound=PillowImage)


@runtime_checkable
class ArrayInterface(Protocol):
    """An array that exposes its memory by numpy's array interface, version 3."""

    @property
    def __array_interface__(self) -> dict[str, Any]:
        """Has typestr, shape and data; strides is None for an array in C order."""


# A path; the bytes of an encoded image; a Pillow image; or an array: uint8 [height, width, 3] RGB
# pixels, or float32 [channels, height, width], resized and normalised as the model wants them.
Image: TypeAlias = "str | os.PathLike[str] | Buffer | PillowImage | ArrayInterface"

_ACCEPTED: Final = "uint8 [height, width, 3] or float32 [channels, height, width]"

_SUFFIXES: Final = frozenset({".bmp", ".jpeg", ".jpg", ".png", ".webp"})

# Keys are formats of the buffer protocol and typestrs of the array interface. The wire is little-endian.
_DATA_TYPES: Final = {
    "B": Tensor.DATA_TYPE_UINT8,
    "|u1": Tensor.DATA_TYPE_UINT8,
    "<f": Tensor.DATA_TYPE_FLOAT32,
    "<f4": Tensor.DATA_TYPE_FLOAT32,
}
if sys.byteorder == "little":
    _DATA_TYPES["f"] = Tensor.DATA_TYPE_FLOAT32


def image_input(image: Image) -> bytes | Tensor:
    """Returns the encoded bytes, or the tensor, to send for an image.

    The file of a path is sent as it is. A Pillow image is sent as RGB pixels; an orientation in its EXIF data is not
    applied. Arrays need not be contiguous.

    Raises:
        OSError: The file cannot be read.
        TypeError: `image` is no image.
        ValueError: An array has another type or shape than the two that are accepted.
    """
    if isinstance(image, bytes):
        return image
    if is_path(image):
        return Path(image).read_bytes()
    if isinstance(image, PillowImage):
        return _pixels(image)
    try:
        view = memoryview(image)  # type: ignore[arg-type]
    except TypeError:
        if isinstance(image, ArrayInterface):
            return _exposed_array(image.__array_interface__)
        raise TypeError(
            "an image is a path, encoded bytes, a Pillow image or an array "
            f"({_ACCEPTED}); got {type(image).__qualname__}"
        ) from None
    if view.ndim == 1 and view.format == "B":
        return view.tobytes()
    return _tensor(view.format, view.shape or (), view.tobytes())


def image_files(folder: Path) -> list[Path]:
    """Returns the JPEG, PNG, WebP and BMP files in a folder and the folders below it, in order of their paths."""
    return sorted(file for file in folder.rglob("*") if file.suffix.lower() in _SUFFIXES and file.is_file())


def is_path(image: Image) -> TypeGuard[str | os.PathLike[str]]:
    """Whether an image is given as the path of a file."""
    return isinstance(image, str | os.PathLike)


def rgb(image: _Pillow) -> _Pillow:
    """Returns a Pillow image in RGB, composited over white if it is transparent; the server does the same with files.

    Raises:
        ValueError: The image has more than 8 bits a channel, which Pillow would clip instead of scale.
    """
    if image.mode.startswith(("I", "F")):
        raise ValueError(f"scale an image of mode {image.mode} to 8 bits a channel first")
    if "A" in image.mode or "a" in image.mode or "transparency" in image.info:
        layer = image.convert("RGBA")
        image = layer.copy()
        image.paste("white", (0, 0, *image.size))
        image.alpha_composite(layer)
    return image.convert("RGB")


def _pixels(image: PillowImage) -> Tensor:
    width, height = image.size
    return Tensor(data_type=Tensor.DATA_TYPE_UINT8, shape=(height, width, 3), data=rgb(image).tobytes())


def _exposed_array(interface: dict[str, Any]) -> Tensor:
    if interface.get("strides") is not None:
        raise ValueError("an array without the buffer protocol must be contiguous, in C order")
    typestr, shape, data = interface["typestr"], interface["shape"], interface["data"]
    if isinstance(data, tuple):
        address, _read_only = data
        count = 1
        for side in shape:
            count *= side
        data = ctypes.string_at(address, count * int(typestr[2:]))
    return _tensor(typestr, shape, bytes(data))


def _tensor(element: str, shape: Sequence[int], data: bytes) -> Tensor:
    data_type = _DATA_TYPES.get(element)
    if data_type is None or len(shape) != 3:
        raise ValueError(f"an array must be {_ACCEPTED}; got shape {list(shape)} of element type {element!r}")
    if data_type == Tensor.DATA_TYPE_UINT8 and shape[2] != 3:
        raise ValueError(f"a uint8 array must be [height, width, 3]; got shape {list(shape)}")
    return Tensor(data_type=data_type, shape=shape, data=data)
