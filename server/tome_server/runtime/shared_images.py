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


@dataclass(frozen=True, eq=False)
class Slot:
    """Where an image lies."""

    images: "SharedImages"
    index: int

    def drop(self) -> None:
        """Give the slot back. Do it once, when nobody needs the image any more."""
        self.images.take_back(self.index)


class SharedImages:
    """A number of slots, each for one image; takes memory only for as many as were ever in use at once.

    Safe to use from several threads.
    """

    def __init__(self, shape: Sequence[int], slots: int) -> None:
        self.shape = tuple(shape)
        self.slots = slots
        self._file = _memory_file()
        os.ftruncate(self._file, _size(self.shape, slots))
        self._images = _mapped(self._file, self.shape, slots)
        # The last one given back comes first, so that no more memory is touched than need be.
        self._free = deque(range(slots))

    def send(self, connection: Connection, pid: int) -> None:
        """Hand the memory to the process `pid` at the other end, which calls `receive` at once. Do it once."""
        reduction.send_handle(connection, self._file, pid)
        os.close(self._file)

    def put(self, image: NDArray[np.float32]) -> Slot:
        """Copy an image, of the shape that all have, into a slot. Raises IndexError if none is free."""
        index = self._free.pop()
        self._images[index] = image
        return Slot(self, index)

    def take_back(self, index: int) -> None:
        """Have a slot free again."""
        self._free.append(index)


def receive(connection: Connection, shape: Sequence[int], slots: int) -> NDArray[np.float32]:
    """Return the images, [slots, *shape], that the process at the other end sent."""
    file = reduction.recv_handle(connection)
    try:
        return _mapped(file, shape, slots)
    finally:
        os.close(file)


def _mapped(file: int, shape: Sequence[int], slots: int) -> NDArray[np.float32]:
    # The array keeps the mapping, and the mapping the memory, for as long as anybody has them.
    return np.frombuffer(mmap.mmap(file, _size(shape, slots)), np.float32).reshape(slots, *shape)


def _size(shape: Sequence[int], slots: int) -> int:
    return slots * math.prod(shape) * np.dtype(np.float32).itemsize


def _memory_file() -> int:
    """Return a file of no name; not in /dev/shm, of which containers have but 64 MiB."""
    if hasattr(os, "memfd_create"):
        return os.memfd_create("tome-images")
    with tempfile.TemporaryFile() as file:
        return os.dup(file.fileno())
