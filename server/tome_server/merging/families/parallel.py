"""Blocks of timm's VisionTransformer whose parts work side by side, with token merging.

Compared with timm's own: the keys, of all attentions where there are several, also serve as the similarity metric, and
attention weighs each token by the patches it stands for. Where attention and MLP read the same tokens there is nothing
between them to merge, so tokens are merged after the block; where several attentions come before several MLPs, tokens
are merged between, as ever.
"""

from functools import reduce
from typing import Any

import torch
from timm.layers import Attention
from timm.models.vision_transformer import ParallelScalingBlock, ParallelThingsBlock
from torch import Tensor

from tome_server.merging.families.vit import self_attention


class ParallelScalingLayers:
    """timm's ParallelScalingBlock (ViT-22B, arXiv 2302.05442): attention beside MLP."""

    def __init__(self, block: ParallelScalingBlock) -> None:
        self.block = block
        self.heads: int = block.num_heads
        self.key_heads = self.heads
        self.head_dim: int = block.head_dim
        self.before, self.after = (block,), ()

    def project(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return queries, keys and values [..., 3 * heads * dim], and the MLP's hidden channels, activated."""
        block = self.block
        projected: Tensor = block.in_proj(block.in_norm(x))
        qkv_width = 3 * self.heads * self.head_dim
        hidden, qkv = torch.split(projected, [projected.shape[-1] - qkv_width, qkv_width], dim=-1)
        if block.mlp_bias is not None:
            hidden = hidden + block.mlp_bias
        # Here and not where they are read: what they are before would be held through attention.
        return qkv, block.mlp_drop(block.mlp_act(hidden))

    def attend(
        self,
        qkv: Tensor,
        rope: Tensor | None,  # noqa: ARG002  tokens have no positions of this kind
        bias: Tensor | None,
        queries: int | None,
    ) -> tuple[Tensor, Tensor]:
        """As encoder.Layers says."""
        return self_attention(self.block, qkv, bias, queries)

    def add_attended(self, x: Tensor, attended: Tensor, side: Tensor | None) -> Tensor:
        """Return `x` with all that the block found added to it; `side` is the MLP's hidden channels."""
        block = self.block
        assert side is not None
        if block.out_proj is not None:
            found = block.out_proj(torch.cat([attended, side], dim=-1))
        else:
            found = block.attn_out_proj(attended) + block.mlp_out_proj(side)
        added: Tensor = block.drop_path(block.ls(found))
        return x + added

    def add_mlp(self, x: Tensor) -> Tensor:
        """Return `x`: the MLP was beside attention."""
        return x


class ParallelThingsLayers:
    """timm's ParallelThingsBlock (arXiv 2203.09795): several attentions, then several MLPs, each kind summed."""

    def __init__(self, block: ParallelThingsBlock) -> None:
        self.block = block
        self.heads: int = sum(branch.attn.num_heads for branch in block.attns)
        self.key_heads = self.heads
        self.head_dim: int = block.attns[0].attn.head_dim
        self.before, self.after = tuple(block.attns), tuple(block.ffns)

    def project(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return `x`: one attention at a time projects it, for the memory that all at once would take."""
        return x, None

    def attend(
        self,
        qkv: Tensor,
        rope: Tensor | None,  # noqa: ARG002  tokens have no positions of this kind
        bias: Tensor | None,
        queries: int | None,
    ) -> tuple[Tensor, Tensor]:
        """As encoder.Layers says, but of tokens not projected yet; keys [B, 1, N, dim] come summed over all heads."""
        found, keys = zip(*(self._attend(branch, qkv, bias, queries) for branch in self.block.attns), strict=True)
        return reduce(torch.add, found), reduce(torch.add, keys)

    @staticmethod
    def _attend(branch: Any, x: Tensor, bias: Tensor | None, queries: int | None) -> tuple[Tensor, Tensor]:
        attn: Attention = branch.attn
        out, k = self_attention(attn, attn.qkv(branch.norm(x)), bias, queries)
        found: Tensor = branch.drop_path(branch.ls(attn.proj_drop(attn.proj(attn.norm(out)))))
        return found, k.sum(dim=1, keepdim=True)

    def add_attended(self, x: Tensor, attended: Tensor, side: Tensor | None) -> Tensor:  # noqa: ARG002  there is none
        """Return `x` with the sum of what the attentions found added to it."""
        return x + attended

    def add_mlp(self, x: Tensor) -> Tensor:
        """Return `x` with the sum of what the MLPs make of it added to it."""
        made: Tensor = reduce(torch.add, [branch(x) for branch in self.block.ffns])
        return x + made
