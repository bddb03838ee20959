"""Images brought to a GPU as they come, while it runs batches.

When a batch starts its images are there already: nothing of it is gathered on the host, or copied, while the GPU waits.
"""

from functools import cache

import torch
from torch import Tensor

from tome_server.device.shared_images import Mapped, Place


class Prefetcher:
    """A model's images on the device; takes memory there only for as many as were ever in use at once.

    One thread brings images, one other may take them: not the same one at once, since who puts an image into a place
    waits until the last one is needed no more.
    """

    def __init__(self, images: Mapped, device: torch.device) -> None:
        self._images = images
        self._device = device
        self._stream = _copies(device) if device.type == "cuda" else None
        self._there: dict[Place, Tensor] = {}
        self._arrivals: dict[Place, torch.Event | None] = {}

    def prefetch(self, place: Place) -> None:
        """Begin to copy the image at `place` to the device, and don't wait for it. Raises where memory runs out."""
        self._arrivals.pop(place, None)
        image = torch.from_numpy(self._images.at(place))
        if self._stream is None:
            self._place(place, image).copy_(image)
            self._arrivals[place] = None
            return
        # Only copies from pinned memory go on beside what the device does. torch keeps it until they have ended.
        staged = torch.empty(image.shape, dtype=image.dtype, pin_memory=True).copy_(image)
        # Memory too is taken for this stream: what another stream gave back may still be read there.
        with torch.cuda.stream(self._stream):
            self._place(place, image).copy_(staged, non_blocking=True)
            self._arrivals[place] = self._stream.record_event()

    def take(self, place: Place) -> Tensor:
        """Return the image at `place`: on the device if it was brought there, and the first time; else on the host.

        What is done next on the device waits until it has arrived.
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
    """Return a stream for copies, which then don't queue behind the batch that runs.

    One for all models: torch has 32 and gives them again after that, and a graph may be recorded on the one given next.
    """
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
