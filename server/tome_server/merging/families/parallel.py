"""Blocks of timm's VisionTransformer whose parts run in parallel, with token merging.

Two things differ from timm's forward pass: the keys, of all attentions if there are several, also serve as the
similarity metric, and attention weighs each token by the number of patches it stands for. A block whose attention and
MLP read the same tokens has no place between them to merge, so its tokens are merged after it. A block of several
attentions followed by several MLPs merges between the two, as plain blocks do.
"""

from functools import reduce
from typing import Any

import torch
from timm.layers import Attention
from timm.models.vision_transformer import ParallelScalingBlock, ParallelThingsBlock
from torch import Tensor

from tome_server.merging.families.vit import self_attention


class ParallelScalingLayers:
    """timm's ParallelScalingBlock (ViT-22B, arXiv 2302.05442): attention and MLP read the same tokens."""

    def __init__(self, block: ParallelScalingBlock) -> None:
        self.block = block
        self.heads: int = block.num_heads
        self.key_heads = self.heads
        self.head_dim: int = block.head_dim
        self.before, self.after = (block,), ()

    def project(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return queries, keys and values [..., 3 * heads * dim], and the MLP's hidden channels after activation."""
        block = self.block
        projected: Tensor = block.in_proj(block.in_norm(x))
        qkv_width = 3 * self.heads * self.head_dim
        hidden, qkv = torch.split(projected, [projected.shape[-1] - qkv_width, qkv_width], dim=-1)
        if block.mlp_bias is not None:
            hidden = hidden + block.mlp_bias
        # Activated here, not in add_attended, so that the values before activation aren't kept during attention.
        return qkv, block.mlp_drop(block.mlp_act(hidden))

    def attend(
        self,
        qkv: Tensor,
        rope: Tensor | None,  # noqa: ARG002  positions are added to the tokens
        bias: Tensor | None,
        queries: int | None,
    ) -> tuple[Tensor, Tensor]:
        """Return attention's output [B, queries or N, heads * dim] and the keys [B, heads, N, dim]."""
        return self_attention(self.block, qkv, bias, queries)

    def add_attended(self, x: Tensor, attended: Tensor, side: Tensor | None) -> Tensor:
        """Return `x` plus the outputs of attention and MLP; `side` is the MLP's hidden channels."""
        block = self.block
        assert side is not None
        if block.out_proj is not None:
            output = block.out_proj(torch.cat([attended, side], dim=-1))
        else:
            output = block.attn_out_proj(attended) + block.mlp_out_proj(side)
        added: Tensor = block.drop_path(block.ls(output))
        return x + added

    def add_mlp(self, x: Tensor) -> Tensor:
        """Return `x`: `add_attended` has added the MLP's output."""
        return x


class ParallelThingsLayers:
    """timm's ParallelThingsBlock (arXiv 2203.09795): a sum of attentions, then a sum of MLPs."""

    def __init__(self, block: ParallelThingsBlock) -> None:
        self.block = block
        self.heads: int = sum(branch.attn.num_heads for branch in block.attns)
        self.key_heads = self.heads
        self.head_dim: int = block.attns[0].attn.head_dim
        self.before, self.after = tuple(block.attns), tuple(block.ffns)

    def project(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return `x`: each attention projects it in its turn, to save the memory of all projections at once."""
        return x, None

    def attend(
        self,
        qkv: Tensor,
        rope: Tensor | None,  # noqa: ARG002  positions are added to the tokens
        bias: Tensor | None,
        queries: int | None,
    ) -> tuple[Tensor, Tensor]:
        """Return the sum of the attentions' outputs [B, queries or N, channels] for tokens `qkv` [B, N, channels].

        The keys [B, 1, N, dim] that come with it are the sum over all heads of all attentions.
        """
        outputs, keys = zip(*(self._attend(branch, qkv, bias, queries) for branch in self.block.attns), strict=True)
        return reduce(torch.add, outputs), reduce(torch.add, keys)

    @staticmethod
    def _attend(branch: Any, x: Tensor, bias: Tensor | None, queries: int | None) -> tuple[Tensor, Tensor]:
        attn: Attention = branch.attn
        out, k = self_attention(attn, attn.qkv(branch.norm(x)), bias, queries)
        output: Tensor = branch.drop_path(branch.ls(attn.proj_drop(attn.proj(attn.norm(out)))))
        return output, k.sum(dim=1, keepdim=True)

    def add_attended(self, x: Tensor, attended: Tensor, side: Tensor | None) -> Tensor:  # noqa: ARG002  there is none
        """Return `x` plus the sum of the attentions' outputs."""
        return x + attended

    def add_mlp(self, x: Tensor) -> Tensor:
        """Return `x` plus the sum of the MLPs' outputs."""
        output: Tensor = reduce(torch.add, [branch(x) for branch in self.block.ffns])
        return x + output
