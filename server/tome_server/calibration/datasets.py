"""Labelled images on disk: a folder of images, or the idx files that MNIST made common.

Images are decoded one at a time when they are used. An idx file is read into memory as a whole.
"""

import gzip
import math
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image

from tome_server.errors import DatasetError

_IMAGE_SUFFIXES = frozenset({".bmp", ".gif", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp"})
_UINT8 = 0x08  # idx's code for unsigned bytes, the only type that images and labels come in


def read_idx(path: Path) -> npt.NDArray[np.uint8]:
    """Read an idx file of unsigned bytes, gzipped or plain, as an array of the shape it declares.

    The layout is: two zero bytes, a type code, the number of dimensions, each dimension as a
    big-endian 32-bit integer, then the values in C order.

    Raises DatasetError when the file is missing, is not idx, holds another type, or is too short
    or too long for its declared shape.
    """
    try:
        raw = path.read_bytes()
        if raw[:2] == b"\x1f\x8b":
            raw = gzip.decompress(raw)
    except (OSError, EOFError, zlib.error) as error:
        raise DatasetError(f"{path} cannot be read: {error}") from error
    if len(raw) < 4 or raw[:2] != b"\0\0":
        raise DatasetError(f"{path} is not an idx file: it does not start with two zero bytes")
    code, dimensions = raw[2], raw[3]
    if code != _UINT8:
        raise DatasetError(f"{path} holds idx type 0x{code:02x}; only unsigned bytes (0x08) are read")
    header = 4 + 4 * dimensions
    if dimensions == 0 or len(raw) < header:
        raise DatasetError(f"{path} ends inside its idx header of {dimensions} dimensions")
    shape = tuple(int.from_bytes(raw[i : i + 4], "big") for i in range(4, header, 4))
    if len(raw) - header != math.prod(shape):
        raise DatasetError(f"{path} declares shape {shape}, {math.prod(shape)} bytes, but holds {len(raw) - header}")
    return np.frombuffer(raw, np.uint8, offset=header).reshape(shape)


class Dataset:
    """Images, each with an integer label or None; made by load_labelled.

    `dataset[i]` and iteration give (image, label). An image is decoded when it is asked for, in the
    mode that it is stored in; one that cannot be decoded raises DatasetError then.
    """

    classes: tuple[str, ...]
    """The labels' names, by label. A folder's are its subfolders' names; an idx file has only
    numbers, so there they are "0", "1", …; empty when the images are unlabelled."""

    def __init__(
        self, open_image: Callable[[int], Image.Image], length: int, labels: list[int] | None, classes: tuple[str, ...]
    ) -> None:
        self.classes = classes
        self._open_image = open_image
        self._length = length
        self._labels = labels

    def __len__(self) -> int:
        return self._length

    @property
    def labels(self) -> tuple[int, ...] | None:
        """The label of each image, or None where they have none."""
        return None if self._labels is None else tuple(self._labels)

    def subset(self, indices: Sequence[int]) -> "Dataset":
        """Return a data set of some of the images, in the order of `indices`, and of the same classes."""
        labels = None if self._labels is None else [self._labels[index] for index in indices]
        return Dataset(lambda index: self._open_image(indices[index]), len(indices), labels, self.classes)

    def split(self, share: float, seed: int) -> tuple[list[int], list[int]]:
        """Return which images to fit to and which to hold out: `share` of each class, chosen at random.

        The same data, share and seed give the same split. Raises DatasetError if the images are unlabelled.
        """
        if self._labels is None:
            raise DatasetError("the images have no labels: put those of each class into a folder of their own")
        random = np.random.default_rng(seed)
        held: list[int] = []
        for label in range(len(self.classes)):
            members = [index for index, own in enumerate(self._labels) if own == label]
            held += sorted(random.permutation(members)[: round(share * len(members))].tolist())
        kept = sorted(set(range(len(self))) - set(held))
        return kept, held

    def __getitem__(self, index: int) -> tuple[Image.Image, int | None]:
        if not 0 <= index < self._length:
            raise IndexError(f"image {index} of {self._length}")
        return self._open_image(index), None if self._labels is None else self._labels[index]

    def __iter__(self) -> Iterator[tuple[Image.Image, int | None]]:
        return (self[index] for index in range(self._length))


def load_labelled(path: Path) -> Dataset:
    """Find the images under path, and their labels where there are any.

    path is one of:

    - a folder of subfolders, each a class named by the subfolder and holding its images; labels
      count the classes in order of name
    - a folder of images, which are unlabelled
    - an idx file of images [images, height, width], grey; its labels are read from the file of the
      same name with `labels-idx1` for `images-idx3`, gzipped or not, if that lies beside it

    Names that start with a dot are passed over. Images come in order of class, then of file name.

    Raises DatasetError when path is none of these, holds no image, or its labels do not fit.
    """
    if path.is_dir():
        return _from_folder(path)
    if path.is_file():
        return _from_idx(path)
    raise DatasetError(f"{path} does not exist")


def _from_folder(folder: Path) -> Dataset:
    images = _images_in(folder)
    subfolders = sorted(p for p in folder.iterdir() if p.is_dir() and not p.name.startswith("."))
    if images and subfolders:
        raise DatasetError(
            f"{folder} holds both images and subfolders ({images[0].name}, {subfolders[0].name}): "
            "put every image into its class's subfolder, or remove the subfolders"
        )
    labels: list[int] | None = None
    if subfolders:
        labels = []
        for label, subfolder in enumerate(subfolders):
            found = _images_in(subfolder)
            if not found:
                raise DatasetError(f"the class folder {subfolder} holds no images")
            images += found
            labels += [label] * len(found)
    if not images:
        raise DatasetError(f"{folder} holds no images")
    return Dataset(
        lambda index: _decode(images[index]), len(images), labels, tuple(subfolder.name for subfolder in subfolders)
    )


def _images_in(folder: Path) -> list[Path]:
    return sorted(
        p
        for p in folder.iterdir()
        if p.suffix.lower() in _IMAGE_SUFFIXES and not p.name.startswith(".") and p.is_file()
    )


def _decode(path: Path) -> Image.Image:
    try:
        with Image.open(path) as image:
            image.load()
            return image
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise DatasetError(f"{path} cannot be decoded: {error}") from error


def _from_idx(path: Path) -> Dataset:
    images = read_idx(path)
    if images.ndim != 3 or images.size == 0:
        raise DatasetError(f"{path} has shape {images.shape}, not [images, height, width]")
    beside = _labels_beside(path)
    if beside is None:
        return Dataset(lambda index: Image.fromarray(images[index]), len(images), None, ())
    labels = read_idx(beside)
    if labels.shape != images.shape[:1]:
        raise DatasetError(f"{beside} has shape {labels.shape}, but {path} holds {len(images)} images")
    return Dataset(
        lambda index: Image.fromarray(images[index]),
        len(images),
        labels.tolist(),
        tuple(str(label) for label in range(int(labels.max()) + 1)),
    )


def _labels_beside(path: Path) -> Path | None:
    if "images-idx3" not in path.name:
        return None
    plain = path.with_name(path.name.replace("images-idx3", "labels-idx1").removesuffix(".gz"))
    both = (plain, plain.with_name(plain.name + ".gz"))
    return next((candidate for candidate in both if candidate.is_file()), None)
