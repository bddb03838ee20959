"""Images in memory that two processes share, so that none goes through a pipe."""

import math
import mmap
import os
import tempfile
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing import reduction
from multiprocessing.connection import Connection

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Place:
    """Where an image lies, as the process at the other end is told."""

    index: int
    pixels: bool
    """Whether it is uint8, and not float32."""


@dataclass(frozen=True, eq=False)
class Slot:
    """Where an image lies, for as long as it is needed."""

    images: "SharedImages"
    place: Place

    def drop(self) -> None:
        """Give the slot back. Do it once, when nobody needs the image any more."""
        self.images.take_back(self.place.index)


class SharedImages:
    """A number of slots, each for one image; takes memory only for as many as were ever in use at once.

    An image is uint8 or float32; of the latter it takes four times the memory.

    Safe to use from several threads.
    """

    def __init__(self, shape: Sequence[int], slots: int) -> None:
        self.shape = tuple(shape)
        self.slots = slots
        self._file = _memory_file()
        os.ftruncate(self._file, _size(self.shape, slots))
        self.mapped = Mapped(self._file, self.shape, slots)
        """as this process sees it"""
        # The last one given back comes first, so that no more memory is touched than need be.
        self._free = deque(range(slots))

    def send(self, connection: Connection, pid: int) -> None:
        """Hand the memory to the process `pid` at the other end, which calls `receive` at once. Do it once."""
        reduction.send_handle(connection, self._file, pid)
        os.close(self._file)

    def put(self, image: NDArray[np.uint8] | NDArray[np.float32]) -> Slot:
        """Copy an image, of the shape that all have, into a slot. Raises IndexError if none is free."""
        place = Place(self._free.pop(), image.dtype == np.uint8)
        self.mapped.at(place)[:] = image
        return Slot(self, place)

    def take_back(self, index: int) -> None:
        """Have a slot free again."""
        self._free.append(index)


class Mapped:
    """The memory of all slots, as one process sees it, for as long as it has this or an image of it."""

    def __init__(self, file: int, shape: Sequence[int], slots: int) -> None:
        values = np.frombuffer(mmap.mmap(file, _size(shape, slots)), np.float32).reshape(slots, -1)
        self._values = values.reshape(slots, *shape)
        # At the beginning of each slot, whose further pages are then never touched.
        self._pixels = values.view(np.uint8)[:, : math.prod(shape)].reshape(slots, *shape)

    def at(self, place: Place) -> NDArray[np.uint8] | NDArray[np.float32]:
        """Return the image that lies there, which is not copied."""
        image: NDArray[np.uint8] | NDArray[np.float32] = (self._pixels if place.pixels else self._values)[place.index]
        return image


def receive(connection: Connection, shape: Sequence[int], slots: int) -> Mapped:
    """Return the images that the process at the other end sent."""
    file = reduction.recv_handle(connection)
    try:
        return Mapped(file, shape, slots)
    finally:
        os.close(file)


def _size(shape: Sequence[int], slots: int) -> int:
    return slots * math.prod(shape) * np.dtype(np.float32).itemsize


def _memory_file() -> int:
    """Return a file of no name; not in /dev/shm, of which containers have but 64 MiB."""
    if hasattr(os, "memfd_create"):
        return os.memfd_create("tome-images")
    with tempfile.TemporaryFile() as file:
        return os.dup(file.fileno())
