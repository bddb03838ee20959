"""What one image costs a model, in multiply-accumulates."""

from dataclasses import dataclass


@dataclass(frozen=True)
class MacCount:
    """Multiply-accumulates for one image, by the convention that papers on ToMe use."""

    dense: int
    """of the unmerged model"""
    merged: int
    """of the merged model, matching and merging apart"""
    overhead: int
    """of matching and merging"""
    tokens_in: int
    """tokens that enter the first block, prefix tokens included"""
    tokens: tuple[int, ...]
    """tokens that leave each block"""
    unread: int = 0
    """of `total`, what the last block needn't compute because the head reads prefix tokens alone, or a part of that"""

    @property
    def total(self) -> int:
        """Of the merged model, matching and merging included."""
        return self.merged + self.overhead

    @property
    def ratio(self) -> float:
        """How many times the merged model's work the unmerged model does, the overhead apart."""
        return self.dense / self.merged
