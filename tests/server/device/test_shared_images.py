"""Images in memory that two processes share."""

import os
import socket
from collections.abc import Iterator
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np
import pytest

from tome_server.device.shared_images import SharedImages, receive


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
    assert [seen.at(slot.place).shape for slot in slots] == [(3, 4, 5)] * 3
    assert [seen.at(slot.place).mean() for slot in slots] == [1.0, 2.0, 3.0]


def test_images_of_both_types_lie_beside_each_other(ends: tuple[Connection, Connection]) -> None:
    images = SharedImages((3, 4, 5), 4)
    images.send(ends[0], os.getpid())
    seen = receive(ends[1], (3, 4, 5), 4)
    kinds = [np.uint8, np.float32, np.uint8, np.float32]
    values = [np.arange(60).reshape(3, 4, 5).astype(kind) + kind(i) for i, kind in enumerate(kinds)]
    slots = [images.put(value) for value in values]
    for slot, value in zip(slots, values, strict=True):
        given = seen.at(slot.place)
        assert given.dtype == value.dtype
        assert np.array_equal(given, value)
    # The same slot may hold the one or the other.
    slots[0].drop()
    again = images.put(values[1])
    assert again.place[0] == slots[0].place[0]
    assert np.array_equal(seen.at(again.place), values[1])


def test_an_image_is_not_copied_where_it_is_seen(ends: tuple[Connection, Connection]) -> None:
    images = SharedImages((3, 4, 5), 2)
    images.send(ends[0], os.getpid())
    seen = receive(ends[1], (3, 4, 5), 2)
    slot = images.put(np.zeros((3, 4, 5), np.uint8))
    before = seen.at(slot.place)
    slot.drop()
    images.put(np.full((3, 4, 5), 9, np.uint8))
    assert before.mean() == 9


def test_it_is_there_for_as_long_as_either_end_has_it(ends: tuple[Connection, Connection]) -> None:
    images = SharedImages((3, 4, 5), 4)
    images.send(ends[0], os.getpid())
    seen = receive(ends[1], (3, 4, 5), 4)
    place = images.put(image(7.0)).place
    del images
    assert seen.at(place).mean() == 7.0


def test_no_two_images_share_a_slot_and_the_last_dropped_is_the_next_used() -> None:
    images = SharedImages((3, 4, 5), 3)
    first, second, third = (images.put(image(0.0)) for _ in range(3))
    assert {first.place[0], second.place[0], third.place[0]} == {0, 1, 2}
    with pytest.raises(IndexError):
        images.put(image(0.0))
    third.drop()
    second.drop()
    assert images.put(image(0.0)).place[0] == second.place[0]
    assert images.put(image(0.0)).place[0] == third.place[0]


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
