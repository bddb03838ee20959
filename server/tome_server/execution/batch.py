"""What a batch is made of and what it gives."""

from dataclasses import dataclass
from typing import Generic, TypeVar

I = TypeVar("I")  # noqa: E741
J = TypeVar("J")


@dataclass(frozen=True)
class BatchItem(Generic[I]):
    """One image of a batch and what is wanted of it."""

    image: I
    """[C, H, W], uint8 or normalised float32, as the model's Preprocess made it, or where that lies"""
    top_k: int
    features: bool = False
    token_map: bool = False
    logits: bool = False
    patches: bool = False
    """Whether the features of each patch are wanted."""

    def on(self, image: J) -> "BatchItem[J]":
        """The same, wanted of `image`."""
        return BatchItem(image, self.top_k, self.features, self.token_map, self.logits, self.patches)


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
