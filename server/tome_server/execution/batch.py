"""What a batch is made of and what it gives."""

from dataclasses import dataclass
from typing import Generic, TypeVar

I = TypeVar("I")  # noqa: E741
J = TypeVar("J")


# Classes of a prediction, unless the request names another number.
DEFAULT_TOP_K = 5


@dataclass(frozen=True)
class Outputs:
    """What is wanted of an image besides its best class."""

    top_k: int = DEFAULT_TOP_K
    """The most probable classes; all of them where the model has fewer."""
    features: bool = False
    token_map: bool = False
    logits: bool = False
    """Whether the logits of all classes are wanted."""
    patches: bool = False
    """Whether the features of each patch are wanted."""


@dataclass(frozen=True)
class BatchItem(Generic[I]):
    """One image of a batch and what is wanted of it."""

    image: I
    """[C, H, W], uint8 or normalised float32, as the model's Preprocess made it, or where that lies"""
    outputs: Outputs

    def on(self, image: J) -> "BatchItem[J]":
        """Return the item that wants the same of `image`."""
        return BatchItem(image, self.outputs)


@dataclass(frozen=True)
class ItemResult:
    """What the model made of one image."""

    class_ids: tuple[int, ...]
    """The top_k most probable classes, best first."""
    scores: tuple[float, ...]
    """Their softmax probabilities."""
    features: bytes | None
    """[D] little-endian float32, as are all but the next; if asked for, as is each"""
    token_map: bytes | None
    """[patches] little-endian int32: the token that each patch went into"""
    logits: bytes | None = None
    """[classes]"""
    patches: bytes | None = None
    """[patches, D], of each patch: those of the token it went into"""


@dataclass(frozen=True)
class BatchResult:
    """What a batch gave and how long it took."""

    results: tuple[ItemResult, ...]
    seconds: float
    """On the device, transfers included."""
