"""The records of one request: what is sent, what is asked for, and the reply."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from tome_server.execution.batch import ItemResult, Outputs
from tome_server.mac_count import MacCount
from tome_server.models.model_info import ModelInfo
from tome_server.models.preprocess import InputSize, Preprocess
from tome_server.observability.request_outcome import Timing

FLOPS_PER_MAC = 2


@dataclass(frozen=True)
class EncodedImage:
    """A JPEG, PNG, WebP or BMP file."""

    data: bytes

    def size(self, preprocess: Preprocess) -> InputSize:
        """Return what decoding takes. Raises InvalidRequestError for what the header shows to be unacceptable."""
        return preprocess.encoded_size(self.data)

    def prepare(self, preprocess: Preprocess) -> NDArray[np.uint8]:
        """Return the network's input [C, H, W]. Raises InvalidRequestError for a damaged image."""
        return preprocess.encoded(self.data)


@dataclass(frozen=True)
class Pixels:
    """[H, W, 3] uint8 RGB."""

    shape: Sequence[int]
    data: bytes

    def size(self, preprocess: Preprocess) -> InputSize:
        """Return what resizing takes. Raises InvalidRequestError for a shape or length that isn't accepted."""
        return preprocess.pixels_size(self.shape, self.data)

    def prepare(self, preprocess: Preprocess) -> NDArray[np.uint8]:
        """Return the network's input [C, H, W]."""
        return preprocess.pixels(self.shape, self.data)


@dataclass(frozen=True)
class Normalised:
    """[C, H, W] float32, the model's own input."""

    shape: Sequence[int]
    data: bytes

    def size(self, preprocess: Preprocess) -> InputSize:
        """Return what copying takes. Raises InvalidRequestError for a shape or length that isn't the model's."""
        return preprocess.normalised_size(self.shape, self.data)

    def prepare(self, preprocess: Preprocess) -> NDArray[np.float32]:
        """Return the network's input [C, H, W]. Raises InvalidRequestError for values that aren't finite."""
        return preprocess.normalised(self.shape, self.data)


ImageInput: TypeAlias = EncodedImage | Pixels | Normalised


@dataclass(frozen=True)
class Request:
    """One image to classify. Times are in seconds of the event loop's clock."""

    model: str
    """Empty for the first model."""
    input: ImageInput
    arrival: float
    deadline: float | None = None
    """None for the model's default budget; infinite for a request without a deadline."""
    r: int | None = None
    min_r: int | None = None
    max_r: int | None = None
    min_quality: float | None = None
    outputs: Outputs = field(default_factory=Outputs)


def deadline_of(arrival: float, budget: float | None, time_remaining: float | None) -> float | None:
    """Return a request's deadline: `arrival` plus the lesser of its budget and the call's own time limit, in seconds.

    `budget` is None where the request names none, infinite where it says that it has no deadline. Returns None for the
    model's default budget, infinity for no deadline.
    """
    limits = [seconds for seconds in (budget, time_remaining) if seconds is not None]
    return arrival + min(limits) if limits else None


@dataclass(frozen=True)
class Reply:
    """A prediction and what was done for it."""

    model: ModelInfo
    result: ItemResult
    r: int
    cost: MacCount
    timing: Timing

    @property
    def flops(self) -> int:
        """Operations done, those of merging included."""
        return FLOPS_PER_MAC * self.cost.total

    @property
    def flops_saved(self) -> int:
        """Operations the unmerged model would have done, less those done."""
        return FLOPS_PER_MAC * (self.cost.dense - self.cost.total)
