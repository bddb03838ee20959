"""Copies images to a GPU as they arrive, while it runs batches.

When a batch starts, its images are on the GPU already, which therefore doesn't wait for them to be gathered and copied.
"""

from functools import cache

import torch
from torch import Tensor

from tome_server.device.shared_images import Mapped, Place


class Prefetcher:
    """A model's images on the device; only places that were ever used take memory there.

    One thread may prefetch images while another takes them. They never touch the same place at once, since no image is
    put into a slot before the one that lay there was dropped.
    """

    def __init__(self, images: Mapped, device: torch.device) -> None:
        self._images = images
        self._device = device
        self._stream = _copies(device) if device.type == "cuda" else None
        self._there: dict[Place, Tensor] = {}
        self._arrivals: dict[Place, torch.Event | None] = {}

    def prefetch(self, place: Place) -> None:
        """Begin to copy the image at `place` to the device, without waiting for it. Raises if memory runs out."""
        self._arrivals.pop(place, None)
        image = torch.from_numpy(self._images.at(place))
        if self._stream is None:
            self._place(place, image).copy_(image)
            self._arrivals[place] = None
            return
        # Only copies from pinned memory overlap with kernels. torch keeps that memory until they have ended.
        staged = torch.empty(image.shape, dtype=image.dtype, pin_memory=True).copy_(image)
        # Allocated on this stream too: a kernel of another stream may still read memory that was freed there.
        with torch.cuda.stream(self._stream):
            self._place(place, image).copy_(staged, non_blocking=True)
            self._arrivals[place] = self._stream.record_event()

    def take(self, place: Place) -> Tensor:
        """Return the image at `place`: on the device if it was prefetched and not taken since, else on the host.

        Kernels that are launched next wait until it has arrived.
        """
        if place not in self._arrivals:
            return torch.from_numpy(self._images.at(place))
        arrival = self._arrivals.pop(place)
        if arrival is not None:
            torch.cuda.current_stream(self._device).wait_event(arrival)
        return self._there[place]

    def _place(self, place: Place, image: Tensor) -> Tensor:
        there = self._there.get(place)
        if there is None:
            there = self._there[place] = torch.empty_like(image, device=self._device)
        return there


@cache
def _copies(device: torch.device) -> torch.cuda.Stream:
    """Return a stream for copies, so that they don't queue behind the batch that runs.

    All models share it: torch has 32 streams and hands them out in turn, so that one for each model could become the
    stream on which graphs are recorded.
    """
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
