"""What goes into a batch and what comes out of it."""

from dataclasses import dataclass
from typing import Generic, TypeVar

I = TypeVar("I")  # noqa: E741
J = TypeVar("J")


# Classes of a prediction, unless the request names another number.
DEFAULT_TOP_K = 5


@dataclass(frozen=True)
class Outputs:
    """The outputs to return for an image."""

    top_k: int = DEFAULT_TOP_K
    """How many of the most probable classes; all of them if the model has fewer."""
    features: bool = False
    token_map: bool = False
    logits: bool = False
    """Whether to return the logits of all classes."""
    patches: bool = False
    """Whether to return the features of each patch."""


@dataclass(frozen=True)
class BatchItem(Generic[I]):
    """One image of a batch, and which outputs to return for it."""

    image: I
    """[C, H, W], uint8 or normalised float32, as the model's Preprocess made it; or where that lies."""
    outputs: Outputs

    def on(self, image: J) -> "BatchItem[J]":
        """Return the same item with another image."""
        return BatchItem(image, self.outputs)


@dataclass(frozen=True)
class ItemResult:
    """The model's outputs for one image. Arrays are little-endian bytes; those that weren't asked for are None."""

    class_ids: tuple[int, ...]
    """The top_k most probable classes, best first."""
    scores: tuple[float, ...]
    """Their softmax probabilities."""
    features: bytes | None
    """[D] float32"""
    token_map: bytes | None
    """[patches] int32: the token that each patch was merged into"""
    logits: bytes | None = None
    """[classes] float32"""
    patches: bytes | None = None
    """[patches, D] float32: for each patch, the features of the token that it was merged into"""


@dataclass(frozen=True)
class BatchResult:
    """The results of a batch, and how long it took."""

    results: tuple[ItemResult, ...]
    seconds: float
    """On the device, transfers included."""
