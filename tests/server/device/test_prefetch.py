"""Images brought to the device ahead of their batch; here the device is the CPU, so that copies have ended at once."""

import numpy as np
import pytest

import tome_server.merging.timm_import  # noqa: F401  isort: skip
import torch

from tome_server.device.prefetch import Prefetcher
from tome_server.device.shared_images import SharedImages

SHAPE = (3, 4, 5)
PIXELS = np.arange(60, dtype=np.uint8).reshape(SHAPE)


@pytest.fixture
def shared() -> SharedImages:
    return SharedImages(SHAPE, 2)


@pytest.fixture
def prefetcher(shared: SharedImages) -> Prefetcher:
    return Prefetcher(shared.mapped, torch.device("cpu"))


@pytest.mark.parametrize("dtype", [np.uint8, np.float32])
def test_what_was_brought_is_taken_from_the_device(shared: SharedImages, prefetcher: Prefetcher, dtype: type) -> None:
    place = shared.put(PIXELS.astype(dtype)).place
    prefetcher.prefetch(place)
    shared.mapped.at(place)[:] = 0  # on the host alone
    assert torch.equal(prefetcher.take(place), torch.from_numpy(PIXELS.astype(dtype)))


def test_what_was_not_brought_is_taken_from_the_host(shared: SharedImages, prefetcher: Prefetcher) -> None:
    place = shared.put(PIXELS).place
    assert torch.equal(prefetcher.take(place), torch.from_numpy(PIXELS))


def test_an_image_of_a_batch_that_failed_can_be_taken_again(shared: SharedImages, prefetcher: Prefetcher) -> None:
    place = shared.put(PIXELS).place
    prefetcher.prefetch(place)
    assert torch.equal(prefetcher.take(place), prefetcher.take(place))


def test_a_place_gives_its_last_image_whatever_was_brought_there_before(
    shared: SharedImages, prefetcher: Prefetcher
) -> None:
    """The one before may never have been taken: its caller had gone."""
    first = shared.put(PIXELS)
    prefetcher.prefetch(first.place)
    first.drop()
    second = shared.put(PIXELS[::-1])
    assert second.place == first.place
    prefetcher.prefetch(second.place)
    assert torch.equal(prefetcher.take(second.place), torch.from_numpy(PIXELS[::-1].copy()))


def test_an_image_that_could_not_be_brought_is_not_taken_for_the_one_before(
    shared: SharedImages, prefetcher: Prefetcher, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = shared.put(PIXELS)
    prefetcher.prefetch(first.place)
    first.drop()
    second = shared.put(PIXELS[::-1])
    monkeypatch.setattr(prefetcher, "_there", None)
    with pytest.raises(AttributeError):
        prefetcher.prefetch(second.place)
    assert torch.equal(prefetcher.take(second.place), torch.from_numpy(PIXELS[::-1].copy()))
