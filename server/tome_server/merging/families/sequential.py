"""What timm's blocks of attention followed by an MLP have in common, whichever model family they belong to."""

from abc import ABC, abstractmethod
from typing import Any

from torch import Tensor, nn


class SequentialLayers(ABC):
    """A block of attention followed by an MLP, taken apart as `encoder.Layers` describes.

    A family's class adds its heads, its projections and its attention.
    """

    norms_first = True
    """Whether norms come before attention and MLP, or after them."""

    def __init__(self, block: Any) -> None:
        self.block = block
        self.attn = block.attn
        self.heads: int = block.attn.num_heads
        self.gate: nn.Linear | None = getattr(block.attn, "gate", None)  # not in all versions of timm
        self.before, self.after = (block.attn,), (block.mlp,)

    @abstractmethod
    def qkv(self, x: Tensor) -> Tensor:
        """Return queries, keys and values [..., (heads + 2 * key_heads) * dim] of tokens after their norm."""

    def project(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return queries, keys and values [..., (heads + 2 * key_heads) * dim], and the gate if attention has one."""
        if self.norms_first:
            x = self.block.norm1(x)
        return self.qkv(x), None if self.gate is None else self.gate(x).sigmoid()

    def attention_output(self, attended: Tensor, gate: Tensor | None) -> Tensor:
        """Return the output [..., channels] of timm's attention module for `attended` [..., heads * dim]."""
        attended = self.attn.norm(attended)
        if gate is not None:
            attended = attended * gate
        output: Tensor = self.attn.proj_drop(self.attn.proj(attended))
        return output


class PostNorm(SequentialLayers):
    """Puts the norms last, before each sum. For a class that names it before its family's."""

    norms_first = False

    def add_attended(self, x: Tensor, attended: Tensor, side: Tensor | None) -> Tensor:
        """Return `x` plus attention's output; `side` is the gate."""
        output: Tensor = self.block.drop_path1(self.block.norm1(self.attention_output(attended, side)))
        return x + output

    def add_mlp(self, x: Tensor) -> Tensor:
        """Return `x` plus the MLP's output."""
        output: Tensor = self.block.drop_path2(self.block.norm2(self.block.mlp(x)))
        return x + output
