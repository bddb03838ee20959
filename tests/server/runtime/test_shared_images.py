"""Images in memory that two processes share."""

import os
import socket
from collections.abc import Iterator
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np
import pytest

from tome_server.runtime.shared_images import SharedImages, receive


@pytest.fixture
def ends() -> Iterator[tuple[Connection, Connection]]:
    ours, theirs = (Connection(end.detach()) for end in socket.socketpair())
    with ours, theirs:
        yield ours, theirs


def image(value: float) -> "np.ndarray[tuple[int, ...], np.dtype[np.float32]]":
    return np.full((3, 4, 5), value, np.float32)


def test_what_one_end_puts_the_other_sees(ends: tuple[Connection, Connection]) -> None:
    images = SharedImages((3, 4, 5), 4)
    images.send(ends[0], os.getpid())
    seen = receive(ends[1], (3, 4, 5), 4)
    slots = [images.put(image(value)) for value in (1.0, 2.0, 3.0)]
    assert seen.shape == (4, 3, 4, 5)
    assert [seen[slot.index].mean() for slot in slots] == [1.0, 2.0, 3.0]


def test_it_is_there_for_as_long_as_either_end_has_it(ends: tuple[Connection, Connection]) -> None:
    images = SharedImages((3, 4, 5), 4)
    images.send(ends[0], os.getpid())
    seen = receive(ends[1], (3, 4, 5), 4)
    index = images.put(image(7.0)).index
    del images
    assert seen[index].mean() == 7.0


def test_no_two_images_share_a_slot_and_the_last_dropped_is_the_next_used() -> None:
    images = SharedImages((3, 4, 5), 3)
    first, second, third = (images.put(image(0.0)) for _ in range(3))
    assert {first.index, second.index, third.index} == {0, 1, 2}
    with pytest.raises(IndexError):
        images.put(image(0.0))
    third.drop()
    second.drop()
    assert images.put(image(0.0)).index == second.index
    assert images.put(image(0.0)).index == third.index


def descriptors() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def test_descriptors_are_closed(ends: tuple[Connection, Connection]) -> None:
    before = descriptors()
    for _ in range(20):
        images = SharedImages((3, 4, 5), 4)
        images.send(ends[0], os.getpid())
        receive(ends[1], (3, 4, 5), 4)
        del images
    # The mapping itself holds one, until nobody has the array.
    assert descriptors() <= before
