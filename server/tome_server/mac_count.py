"""The multiply-accumulates that a model needs for one image."""

from dataclasses import dataclass


@dataclass(frozen=True)
class MacCount:
    """Multiply-accumulates for one image, counted as in papers on ToMe: without softmax, norms and activations."""

    dense: int
    """the unmerged model's"""
    merged: int
    """the merged model's, without matching and merging"""
    overhead: int
    """those of matching and merging"""
    tokens_in: int
    """number of tokens that enter the first block, prefix tokens included"""
    tokens: tuple[int, ...]
    """number of tokens that leave each block, prefix tokens included"""
    unread: int = 0
    """the part of `total` that the last block can skip because the head reads prefix tokens only; a lower bound"""

    @property
    def total(self) -> int:
        """The merged model's, with matching and merging."""
        return self.merged + self.overhead

    @property
    def ratio(self) -> float:
        """The unmerged model's count divided by the merged model's, without the overhead."""
        return self.dense / self.merged
