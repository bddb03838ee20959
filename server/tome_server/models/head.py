"""A linear classifier on a model's features."""

from dataclasses import dataclass

from torch import Tensor
from torch.nn import functional as F


@dataclass(frozen=True)
class Head:
    """A linear layer: features [B, D] times `weight` transposed, plus `bias`."""

    weight: Tensor
    """[classes, D] float32"""
    bias: Tensor
    """[classes] float32"""
    penalty: float
    """The weight of the penalty that was chosen by cross-validation."""
    accuracy: float
    """Share of images classified as labelled, each by a head that was fitted to the other folds."""

    def __call__(self, features: Tensor) -> Tensor:
        """Return the logits [B, classes]."""
        return F.linear(features, self.weight, self.bias)
