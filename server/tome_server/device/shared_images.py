"""Images in memory that two processes share, so that no image is sent through a pipe."""

import math
import mmap
import os
import tempfile
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing import reduction
from multiprocessing.connection import Connection
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

# A plain tuple, since one goes to the other process with every image: no record is pickled faster.
Place: TypeAlias = tuple[int, bool]
"""Where an image lies in the shared memory: its slot, and whether it is uint8 rather than float32."""


@dataclass(frozen=True, eq=False)
class Slot:
    """A slot of the shared memory that an image takes, until it is dropped."""

    images: "SharedImages"
    place: Place

    def drop(self) -> None:
        """Give the slot back. Do it once, when the image isn't needed any more."""
        self.images.take_back(self.place[0])


class SharedImages:
    """Memory of a fixed number of slots, one image each; only slots that were ever used take any.

    An image is uint8 or float32, which takes four times the memory. Safe to use from several threads.
    """

    def __init__(self, shape: Sequence[int], slots: int) -> None:
        self.shape = tuple(shape)
        self.slots = slots
        self._file = _memory_file()
        os.ftruncate(self._file, _size(self.shape, slots))
        self.mapped = Mapped(self._file, self.shape, slots)
        """The memory as this process sees it."""
        # The slot given back last is used first, so that as few as possible are ever touched.
        self._free = deque(range(slots))

    def send(self, connection: Connection, pid: int) -> None:
        """Send the memory to the process `pid` at the other end, which must call `receive` next. Do it once."""
        reduction.send_handle(connection, self._file, pid)
        os.close(self._file)

    def put(self, image: NDArray[np.uint8] | NDArray[np.float32]) -> Slot:
        """Copy an image of `shape` into a free slot. Raises IndexError if there is none."""
        place = (self._free.pop(), image.dtype == np.uint8)
        self.mapped.at(place)[:] = image
        return Slot(self, place)

    def take_back(self, slot: int) -> None:
        """Make a slot free again."""
        self._free.append(slot)


class Mapped:
    """The memory of all slots, mapped into one process for as long as this or an image of it is alive."""

    def __init__(self, file: int, shape: Sequence[int], slots: int) -> None:
        values = np.frombuffer(mmap.mmap(file, _size(shape, slots)), np.float32).reshape(slots, -1)
        self._values = values.reshape(slots, *shape)
        # At the beginning of each slot, so that its other pages are never touched.
        self._pixels = values.view(np.uint8)[:, : math.prod(shape)].reshape(slots, *shape)

    def at(self, place: Place) -> NDArray[np.uint8] | NDArray[np.float32]:
        """Return the image at `place`, without copying it."""
        slot, pixels = place
        image: NDArray[np.uint8] | NDArray[np.float32] = (self._pixels if pixels else self._values)[slot]
        return image


def receive(connection: Connection, shape: Sequence[int], slots: int) -> Mapped:
    """Return the memory that the process at the other end sent."""
    file = reduction.recv_handle(connection)
    try:
        return Mapped(file, shape, slots)
    finally:
        os.close(file)


def _size(shape: Sequence[int], slots: int) -> int:
    return slots * math.prod(shape) * np.dtype(np.float32).itemsize


def _memory_file() -> int:
    """Return a file without a name; not in /dev/shm, which has only 64 MiB in a container."""
    if hasattr(os, "memfd_create"):
        return os.memfd_create("tome-images")
    with tempfile.TemporaryFile() as file:
        return os.dup(file.fileno())
